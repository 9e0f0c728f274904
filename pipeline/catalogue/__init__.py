"""The store as people see it: what is in it, what it was made from, and what it is called."""
