"""Where a run starts: anew, or after the last state of itself or of another run, if that computed the same."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from repro.config import ModelArguments, TrainingArguments
from repro.errors import InputError
from repro.prepare import PreparedRun
from repro.reporting.writer import Recorded, check_output_dir, holds_only_a_start, read_facts, read_recorded
from repro.training.checkpoint import Found, find_newest

STATE = "state"
MODES = ("never", "auto")


@dataclasses.dataclass(frozen=True)
class Start:
    """Where training starts.

    Attributes:
        found: the state that it goes on from; None to start anew.
        recorded: steps and evaluations up to there.
        parts: when, where and with what the earlier parts of the run were computed.
    """

    found: Found | None
    recorded: Recorded
    parts: list[dict[str, Any]] = dataclasses.field(default_factory=list)

    @property
    def step(self) -> int:
        return self.found.step if self.found else 0

    @property
    def num_replicas(self) -> int | None:
        return self.found.record["settings"]["num_replicas"] if self.found else None

    @property
    def training_seconds(self) -> float:
        return self.found.record["training_seconds"] if self.found else 0.0


ANEW = Start(None, Recorded([]))


def choose_start(args: TrainingArguments, folder: Path) -> Start:
    """Do what `--resume` says; looks only, changes nothing.

    Raises:
        InputError: the folder holds something that this run may not go on with or replace, or there is no such state.
    """
    if args.resume == "never":
        check_output_dir(folder, overwrite=args.overwrite_output_dir)
        return ANEW
    if args.resume == "auto":
        found = find_newest(folder / STATE)
        if found is None:
            if not holds_only_a_start(folder):
                raise InputError(
                    f"--resume auto: {folder} holds no state that can be used, but other files; name another"
                    " --output_dir, or add --overwrite_output_dir to start anew in it."
                )
            return ANEW
        return _after(found)
    source = Path(args.resume)
    step = int(source.name) if source.name.isdigit() else None
    states = source.parent if step is not None else source if source.name == STATE else source / STATE
    found = find_newest(states, step=step) if states.is_dir() else None
    if found is None:
        raise InputError(
            f"--resume {args.resume}: holds no state that can be used; give auto, never, the folder of a run, or of one"
            f" of its states ({STATE}/STEP)."
        )
    if states.parent.absolute() != folder.absolute():
        check_output_dir(folder, overwrite=args.overwrite_output_dir)
    return _after(found)


def _after(found: Found) -> Start:
    folder = Path(found.folder).parent
    return Start(found, read_recorded(folder, found.step), read_facts(folder).get("parts", []))


def settings(prepared: PreparedRun, model_args: ModelArguments) -> dict[str, Any]:
    """Collect what the numbers of a run depend on: what may not change when it is resumed."""
    flags = {
        field.name: getattr(arguments, field.name)
        for arguments in (model_args, prepared.data_args, prepared.args)
        for field in dataclasses.fields(arguments)
        if not field.metadata.get("may_change")
    }
    return {
        "flags": flags,
        "protocol": dataclasses.asdict(prepared.protocol),
        "num_replicas": prepared.num_replicas,
        "num_steps": prepared.num_steps,
        "shuffle": prepared.shuffle,
        "model": prepared.facts["model"]["fingerprint"],
        "data": {
            split: {name: counts[name] for name in ("kept", "fingerprint")}
            for split, counts in prepared.facts["data"].items()
        },
    }


def check_same(saved: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Check that a run would go on as it began.

    Raises:
        InputError: names every setting that differs, with both values.
    """
    different = list(_differences(saved, now))
    if different:
        raise InputError(
            "--resume: the state belongs to a run that computes something else:\n  "
            + "\n  ".join(different)
            + "\nUse the earlier values, or start anew in another --output_dir."
        )


def _differences(saved: Mapping[str, Any], now: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for name in sorted({*saved, *now}):
        before, after = saved.get(name, "absent"), now.get(name, "absent")
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            yield from _differences(before, after, f"--{name[:0]}" if name == "flags" else f"{prefix}{name} ")
        elif before != after and not (prefix == "data " and "absent" in (before, after)):
            yield f"{prefix}{name}: {before} then, {after} now"
