"""Which weighted combinations are compared with peft: for the script that asks peft, and for the tests."""

WEIGHTS = {"a": 0.7, "bb": -0.4}
CASES = {  # options of `add_weighted_adapter`; peft's have the same names but for `combination_type`
    "linear": {"combination": "linear"},
    "cat": {"combination": "cat"},
    "svd": {"combination": "svd"},
    "svd-2": {"combination": "svd", "svd_rank": 2},
    "ties": {"combination": "ties", "density": 0.4},
    "ties-frequency": {"combination": "ties", "density": 0.6, "majority_sign_method": "frequency"},
    "ties_svd": {"combination": "ties_svd", "density": 0.4, "svd_rank": 4},
    "magnitude_prune": {"combination": "magnitude_prune", "density": 0.4},
    "magnitude_prune_svd": {"combination": "magnitude_prune_svd", "density": 0.4, "svd_rank": 4},
}
