"""The section on the full model against the reduced one."""

from nodepint_mpi.pages.parts import Lines, Picture, Section
from nodepint_mpi.report.trained import Model
from nodepint_mpi.rom.evaluate import compare_models, format_comparison


def reduced_model(model: Model) -> Section | None:
    """Both on the test split: error, speed, size, and a picture."""
    if model.reduced is None:
        return None
    result, figure = compare_models(model.reduced.rom, model.trained, model.reduced.file)
    caption = "The first test sample by the full and by the reduced model."
    if model.predicted is None or model.predicted.is_labels:
        caption = "Logits of the test samples by the full and by the reduced model."
    return Section(
        "Full model against reduced model",
        [
            repr(model.reduced.rom),
            Lines(format_comparison(result).splitlines()),
            Picture("reduced_model", figure, caption),
        ],
    )
