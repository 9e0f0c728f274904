"""`align doctor`: what this machine has and lacks for the stages."""
