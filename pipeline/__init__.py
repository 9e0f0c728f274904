"""The top layer: the command line, the configuration, the commands and what they print, the quickstart."""
