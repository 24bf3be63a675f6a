"""Token prices: what a plan earns as a function of them, and the search for the best."""
