"""The runs of trl's PPOTrainer that are compared: what both sides must know, and neither's packages."""

PROMPTS = [[7, 8, 9], [10, 11], [12], [13, 14, 15, 16], [17, 18], [19], [20, 21, 22], [23, 24]]
LENGTH, END, PENALTY, TEMPERATURE = 6, 38, 1.0, 0.7
RUNS = {
    "k1": {
        "seed": 17,
        "kl": "k1",
        "beta": 0.3,
        "gamma": 1.0,
        "lam": 0.95,
        "whiten": False,
        "epochs": 1,
        "rate": 0.0,
        "clip": 0.2,
    },
    "k3": {
        "seed": 9,
        "kl": "k3",
        "beta": 0.2,
        "gamma": 0.9,
        "lam": 0.8,
        "whiten": True,
        "epochs": 3,
        "rate": 0.001,
        "clip": 0.1,
    },
}
