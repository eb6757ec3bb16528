"""The sections of a config for learning from preferences and rewards."""

from typing import Annotated, Any, Literal

from pydantic import Field

from .section import Count, Finite, Positive, Section, Text


class RewardModel(Section):
    """What a reward model needs besides.

    `margin`: what the chosen answer's score should be above the other's at least, where a row does not say it itself.
    `centering`: weight of the squared sum of both scores, which holds them around zero. `dropout`: whether that
    of the base and of earlier adapters is on; that of the run's own method is on wherever it is asked for.
    """

    margin: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    centering: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    dropout: bool = False


class Dpo(Section):
    """What direct preference optimisation needs besides: as `jaxft.losses.make_dpo_loss`; `dropout` as for `reward`."""

    beta: Positive = 0.1
    kind: Literal["sigmoid", "robust", "hinge", "ipo"] = "sigmoid"
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = 0.0
    dropout: bool = False


class RewardTerm(Section):
    """One reward of several: a run, a model folder, `file.py:function`, or the name of one of `jaxft.rewards`."""

    reward: Text
    weight: Finite = 1.0
    options: dict[str, Any] = Field(default_factory=dict)


class Rollouts(Section):
    """How answers are drawn from the policy, and what they are worth.

    `missing_end_penalty` is taken off the reward of an answer that did not come to its end within `max_new_tokens`.
    """

    reward: Annotated[tuple[RewardTerm, ...], Field(min_length=1, strict=False)]
    max_new_tokens: Count = 64
    temperature: Positive = 1.0
    top_k: Annotated[int, Field(ge=0)] = 0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    missing_end_penalty: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None
    epochs: Count = 1
    minibatches: Count = 1
    clip: Annotated[float, Field(gt=0, lt=1)] = 0.2


class Ppo(Rollouts):
    """What proximal policy optimisation needs besides.

    `kl_target`: the coefficient is adapted towards this KL per answer (None: it is fixed), over `kl_horizon` answers.
    `max_kl`: no further minibatch of a step once the policy has moved so far from the one that drew the answers (KL per
    token). `critic`: the critic's method; None: the policy's. `score_position`: whether the score is the reward of the
    last token, or of the place after it, as trl has it. `value_clip`: None: values are not held near the old ones.

    A step of the run is one round of answers, and what `optimizer` says of steps is of these: all `epochs` x
    `minibatches` updates of a round have one learning rate. Dropout is off.
    """

    kl_coefficient: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.05
    kl_kind: Literal["k1", "k2", "k3"] = "k1"
    kl_target: Positive | None = None
    kl_horizon: Positive = 10_000.0
    max_kl: Positive | None = None
    epochs: Count = 4
    value_clip: Positive | None = 0.2
    value_coefficient: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.1
    entropy_coefficient: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    gamma: Annotated[float, Field(gt=0, le=1)] = 1.0
    lam: Annotated[float, Field(ge=0, le=1)] = 0.95
    whiten_rewards: bool = False
    score_position: Literal["end", "after_end"] = "end"
    critic: dict[str, Any] | None = None


class Grpo(Rollouts):
    """What group relative policy optimisation needs besides.

    `group_size`: answers to one prompt; `train.batch_size` counts answers. `kl_coefficient`: weight of the KL to the
    policy that the stage starts from; 0: there is no such reference. `correct_kl`, `ratio`, `reduction`: as of
    `jaxft.losses.grpo_loss`; `scale`: as of `jaxft.losses.group_advantages`. `clip_high`: None: as `clip`.
    """

    group_size: Annotated[int, Field(ge=2)] = 8
    kl_coefficient: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    correct_kl: bool = False
    clip_high: Positive | None = None
    ratio: Literal["token", "sequence"] = "token"
    reduction: Literal["grpo", "bnpo", "dr_grpo", "dapo"] = "dapo"
    scale: Literal["group", "batch", "none"] = "group"
