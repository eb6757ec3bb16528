"""What answers are worth: by name, by a function of one's own, by a model; several weighted and summed.

>>> from jaxft.rewards import Answers, Term, make_reward
>>> reward = make_reward([Term("exact_answer"), Term("length", weight=0.1, options={"target": 1})])
>>> reward(Answers(["2 + 2 ="], ["4"], {"answer": ["4"]})).tolist()
[1.100000023841858]
"""

from .answers import Answers
from .make import Reward, Term, make_reward, read_rewards
from .named import ExactAnswer, Length, Regex

__all__ = ["Answers", "ExactAnswer", "Length", "Regex", "Reward", "Term", "make_reward", "read_rewards"]
