"""The evaluations of several models on the same documents, put beside each other."""

from typing import Any

from rwkv_train.errors import ConfigError
from rwkv_train.evaluation.comparison import differences
from rwkv_train.evaluation.job import Evaluation, Job
from rwkv_train.evaluation.positions import Curve


def results_of(jobs: list[Job], evaluations: list[Evaluation]) -> list[dict[str, Any]]:
    """Return what was found of each model as JSON's types, with its differences to the first one.

    Args:
        jobs: what was done, on the same data.
        evaluations: of each job.
    """
    first = evaluations[0]
    results = []
    for job, evaluation in zip(jobs, evaluations, strict=True):
        compared = None
        if evaluation is not first:
            same_tokenizer = evaluation.tokenizer.matches(first.tokenizer)
            parts = differences(first.report, evaluation.report, same_tokenizer=same_tokenizer)
            compared = {
                "total": parts.pop(None).to_json(),
                "domains": {domain: part.to_json() for domain, part in parts.items()},
            }
        results.append(
            {
                "checkpoint": job.checkpoint,
                **({} if job.adapter is None else {"adapter": job.adapter}),
                "state": job.state,
                "tokenizer": evaluation.tokenizer._asdict(),
                "prefix_token": evaluation.prefix_token,
                **evaluation.report.to_json(),
                "difference_to_first": compared,
            }
        )
    return results


def curves_of(evaluations: list[Evaluation], min_length: int | None) -> list[Curve]:
    """Return loss by position of each model, all over one length.

    Args:
        evaluations: of each model.
        min_length: of the documents, a power of two; ``None``: the shortest of their usual lengths.

    Raises:
        ConfigError: no document is so long.
    """
    positions = [evaluation.report.positions for evaluation in evaluations]
    length = min_length or min(sums.usual_length() for sums in positions)
    curves = [sums.curve(length) for sums in positions]
    if not all(curve.documents for curve in curves):
        raise ConfigError(f"--min-length is {length}, but no document has so many tokens; take a smaller one")
    return curves
