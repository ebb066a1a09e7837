"""Model bundles and the force estimator node; runs without torch."""
