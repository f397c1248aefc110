"""The evaluations of one call of `evaluate.py`: every set, with every kind of weights."""

import sys
import time
from argparse import Namespace
from collections import Counter
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import fields, replace
from functools import partial
from pathlib import Path

from gcvit.checkpoint import weights_source
from gcvit.checkpoint.weights_source import Candidate
from gcvit.config.schema import DataConfig
from gcvit.errors import UserError
from gcvit.evaluation import metrics, predictions
from gcvit.evaluation import results as evaluation_record
from gcvit.evaluation.evaluator import Result, evaluate
from gcvit.evaluation.label_sets import ImageSet, Targets, find_rights, find_targets, open_set
from gcvit.evaluation.predictions import Predictions
from gcvit.evaluation.tta import PRECISIONS, Options, Views
from gcvit.model import GCViT
from gcvit.runtime.distributed import World


def read_options(arguments: Namespace) -> Options:
    """Read the options of a call.

    Raises:
        UserError: The file of predictions cannot be written.
    """
    if arguments.predictions:
        predictions.check_path(Path(arguments.predictions))
    names = [field.name for field in fields(Options)]
    given = {name: value for name in names if (value := getattr(arguments, name)) is not None}
    if arguments.batch_size:
        given["batch_size"] = arguments.batch_size[0]
    return Options(**given)


def open_sets(arguments: Namespace) -> list[ImageSet]:
    """Open the sets of a call, under different names.

    Raises:
        UserError: Data is missing, corrupt or given twice.
    """
    cache = (arguments.cache_dir, arguments.cache_bytes)
    sets = [open_set(given, arguments.split or "val", *cache) for given in arguments.data_dir or ()]
    if len(set(arguments.data_dir or ())) < len(sets):
        given = ", ".join(map(evaluation_record.hide_secrets, arguments.data_dir))
        raise UserError("the same set twice", got=given, hint="name each once")
    for name_of in (_add_folder, _add_number):
        num = Counter(one.name for one in sets)
        sets = [
            replace(one, name=name_of(one, given, number)) if num[one.name] > 1 else one
            for number, (one, given) in enumerate(zip(sets, arguments.data_dir or (), strict=True), start=1)
        ]
    return sets


def _add_folder(one: ImageSet, given: str, number: int) -> str:
    return f"{one.name}-{Path(evaluation_record.hide_secrets(given)).name}"


def _add_number(one: ImageSet, given: str, number: int) -> str:
    return f"{one.name}-{number}"


def find_candidates(arguments: Namespace, options: Options) -> list[Candidate]:
    """Yield the weights to evaluate.

    Raises:
        UserError: Weights are missing or do not fit.
    """
    if arguments.model:
        resample = options.img_size is not None
        files = [weights_source.find_file(arguments.model, path, resample=resample) for path in arguments.checkpoint]
        found = [weights_source.average(files)]
    else:
        kinds = ("ema", "model") if arguments.weights == "both" else (arguments.weights,)
        found = [
            weights_source.average([weights_source.find_candidate(run, kind) for run in arguments.runs])
            for kind in kinds
        ]
    options.prepare(found[0].data)
    return found


def match(sets: Sequence[ImageSet], model: Candidate) -> list[Targets]:
    """Find the right outputs of the model for each set.

    Raises:
        UserError: Classes do not fit.
    """
    known = (model.classes, model.model.num_classes, model.path)
    return [find_targets(one.label_set, one.source, *known) for one in sets]


def evaluate_all(
    sets: Sequence[ImageSet],
    targets: Sequence[Targets],
    candidates: Sequence[Candidate],
    options: Options,
    world: World,
    *,
    out: str | None = None,
    predictions_file: str | None = None,
) -> None:
    """Evaluate on all ranks together, print the results, and write the records and predictions.

    `targets` are those of `match`, for each set; the candidates have the same classes.

    Raises:
        UserError: A record or the predictions cannot be written.
    """
    _check_alike("data", [(evaluation_record.hide_secrets(one.dir), one.source.digest) for one in sets], world)
    _check_alike("weights", [(weights.path, weights.step) for weights in candidates], world)
    # An image's name may take a look into its shard: one rank asks for all.
    targets = [
        world.on_rank0(partial(find_rights, target, one.source)) if one.has_many_rights else target
        for one, target in zip(sets, targets, strict=True)
    ]
    folder = world.on_rank0(lambda: evaluation_record.make_folder(out, candidates[0].run_dir))
    writes = predictions_file is not None and world.is_rank0
    records = []
    with predictions.open_writer(Path(predictions_file or "")) if writes else nullcontext() as append:
        for weights in candidates:
            state = weights.read(world)
            sizes = options.sizes_of(weights.model)
            modules = [weights_source.load(weights, state, size).to(world.device) for size in sizes]
            sha256 = weights_source.digest(state)
            _check_alike("weights", [(weights.path, sha256)], world)
            for one, target in zip(sets, targets, strict=True):
                begin = time.perf_counter()
                result, found = _evaluate(modules, one, target, weights.data, sizes, options, world)
                seconds = time.perf_counter() - begin
                if not world.is_rank0:
                    continue
                details = metrics.score(found, target.classes, partial(predictions.key_of, one.source))
                record = evaluation_record.describe(
                    one,
                    weights,
                    options,
                    world,
                    sha256=sha256,
                    seconds=seconds,
                    result=_counts(result) | details,
                )
                print(evaluation_record.as_line(record), flush=True)
                records.append(record)
                if folder:
                    evaluation_record.keep(folder, record, options.tags)
                if append:
                    for rows in predictions.rows_of(one.name, weights.weights, found, one.source, target.classes):
                        append(rows)
    if world.is_rank0:
        print(evaluation_record.as_table(records), file=sys.stderr, flush=True)


def _check_alike(what: str, found: Sequence[tuple[str, object]], world: World) -> None:
    """Check that all ranks found the same weights and data, since their counts are summed.

    Raises:
        UserError: They differ; raised on all ranks.
    """
    of_ranks = world.gather(list(found))
    rank, others = next(((rank, others) for rank, others in enumerate(of_ranks) if others != of_ranks[0]), (0, []))
    if rank:
        pairs = zip(of_ranks[0], others, strict=True)
        one, other = next((one, other) for one, other in pairs if one != other)
        raise UserError(
            f"processes find different {what}",
            got=f"{one[0]} ({one[1]}) on rank 0, {other[0]} ({other[1]}) on rank {rank}",
            hint="put them on a disk that all nodes share; of a run that still trains, name RUN/checkpoints/step_N",
        )


def _evaluate(
    modules: Sequence[GCViT],
    one: ImageSet,
    targets: Targets,
    data: DataConfig,
    sizes: Sequence[int],
    options: Options,
    world: World,
) -> tuple[Result, Predictions]:
    views = Views(
        modules,
        flip=options.tta is not None,
        five_crop=options.five_crop,
        columns=None if targets.columns is None else targets.columns.to(world.device),
        dtype=PRECISIONS[options.precision],
    )
    collector = predictions.Collector()
    result = evaluate(
        views,
        one.source,
        options.prepare(data),
        world,
        img_size=sizes,
        batch_size=options.batch_size,
        skip_corrupt=options.skip_corrupt,
        five_crop=options.five_crop,
        targets=targets,
        watch=collector,
    )
    found = collector.gather(world)
    assert (len(found), int((found.ranks < 1).sum())) == (result.num_samples, result.correct_top1)
    return result, found


def _counts(result: Result) -> dict[str, float | int]:
    return result.as_dict() | {"correct_top5": result.correct_top5, "num_unlabelled": result.num_unlabelled}
