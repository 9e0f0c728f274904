"""`align plan`: steps, tokens, memory and time of a training run before it is started."""
