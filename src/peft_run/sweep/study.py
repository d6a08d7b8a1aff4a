"""The search by Optuna: its TPE sampler, its median pruner, and its storage, which several machines may share."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import optuna
from optuna.trial import TrialState

from peft_run.errors import RunError
from peft_run.sweep.folder import DONE, FAILED, PRUNED, STARTED, Folder
from peft_run.sweep.settings import Settings
from peft_run.sweep.space import Axis, Point, Space

STATES = {DONE: TrialState.COMPLETE, PRUNED: TrialState.PRUNED, FAILED: TrialState.FAIL}


class Study:
    """A trial is told to the study when it has ended; until then others see it as running."""

    def __init__(self, folder: Folder, settings: Settings, space: Space) -> None:
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self.folder, self.settings, self.space = folder, settings, space
        self.shared = settings.storage is not None
        self.total = settings.trials or 0
        known = folder.trials()
        # A process of its own begins its draws anew: another seed, or it would draw the same again. Machines that share
        # a study must not draw alike either.
        seed = None if self.shared else settings.seed + len(known)
        try:
            self.study = optuna.create_study(
                storage=settings.storage or f"sqlite:///{folder / 'study.db'}",
                study_name=settings.study or settings.name,
                direction="minimize" if settings.lower_is_better else "maximize",
                sampler=optuna.samplers.TPESampler(seed=seed, multivariate=True, constant_liar=self.shared),
                pruner=optuna.pruners.MedianPruner() if settings.prune == "median" else optuna.pruners.NopPruner(),
                load_if_exists=True,
            )
        except Exception as error:  # whatever the database's driver raises
            problem = " ".join(str(error).split())[:300]
            raise RunError("sweep.no_storage", storage=settings.storage or "study.db", problem=problem) from error
        self.settle(known)

    def settle(self, known: dict[int, dict[str, Any]]) -> None:
        """After a crash, the study may not know of an end; or know of a trial that nobody began."""
        for frozen in self.study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            result = known.get(frozen.number)
            if result is not None and result["state"] != STARTED:
                self.ended(frozen.number, result)
            elif result is None and not self.shared:
                self.study.tell(frozen.number, state=TrialState.FAIL)

    def upcoming(self) -> Iterator[tuple[int, Point]]:
        for number, result in self.folder.trials().items():
            if result["state"] == STARTED:
                yield number, result["values"]
        while self.begun() < self.total:
            trial = self.study.ask()
            yield trial.number, {axis.name: suggest(trial, axis) for axis in self.space.axes}

    def begun(self) -> int:
        """Trials so far; of all machines, where they share the study."""
        return len(self.study.get_trials(deepcopy=False)) if self.shared else len(self.folder.trials())

    def evaluated(self, number: int, event: dict[str, Any]) -> bool:
        """Trials are held against each other at the same share of their steps."""
        value = event.get(f"eval_{self.settings.objective}")
        if value is None:  # measured only at the end: the loss stands in, turned the way the study looks
            value = event["eval_loss"] * (1 if self.settings.lower_is_better else -1)
        frozen = next(t for t in self.study.get_trials(deepcopy=False) if t.number == number)
        trial = optuna.trial.Trial(self.study, frozen._trial_id)
        percent = round(100 * event["step"] / event["total"])
        if percent in frozen.intermediate_values:  # a resumed trial comes here again
            return True
        trial.report(value, percent)
        return percent == 100 or not trial.should_prune()

    def ended(self, number: int, result: dict[str, Any]) -> None:
        state = STATES[result["state"]]
        self.study.tell(number, result["objective"] if state == TrialState.COMPLETE else None, state=state)


def suggest(trial: optuna.trial.Trial, axis: Axis) -> Any:
    if axis.values is None:
        if axis.integer:
            return trial.suggest_int(axis.name, int(axis.low), int(axis.high), log=axis.log)
        return trial.suggest_float(axis.name, axis.low, axis.high, log=axis.log)
    if all(isinstance(value, int | float) and not isinstance(value, bool) for value in axis.values):
        ordered = sorted(axis.values)  # TPE learns more from an order than from mere names
        return ordered[trial.suggest_int(axis.name, 0, len(ordered) - 1)]
    return axis.values[trial.suggest_categorical(axis.name, range(len(axis.values)))]
