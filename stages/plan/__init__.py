"""`align plan`: what a training run will take, before it is started."""
