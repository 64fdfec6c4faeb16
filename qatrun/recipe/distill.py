"""The `train.distill` section: a teacher whose next-token probabilities are learned beside, or instead of, the text."""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator, Field, PositiveFloat

from qatrun.paths import expand_path
from qatrun.recipe.qat import Section

START_MODEL = "start"


class DistillConfig(Section):
    """Distillation: `(1 - weight) * cross-entropy + weight * temperature^2 * KL(teacher || model)`, over the same tokens."""

    teacher: Annotated[str, Field(min_length=1), AfterValidator(expand_path)] = Field(
        START_MODEL,
        description="`start`: the model that training starts from; or a local folder or hub id of a model with the same "
        "vocabulary",
    )
    weight: float = Field(
        0.5,
        ge=0.0,
        le=1.0,
        description="share of the loss that is the divergence from the teacher; 1: nothing else (QAD); 0: only measured",
    )
    temperature: PositiveFloat = Field(
        1.0, description="logits of both are divided by it; above 1 unlikely tokens count for more"
    )
