"""`align online`: rounds over the stages, each round on completions of the policy of the round before."""
