"""`align sweep`: many trainings from one store, ranked."""
