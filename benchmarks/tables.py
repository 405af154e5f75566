"""The HierTCN paper's Tables 2 to 6 and its memory figure, for any log, and a table of options.

    python -m benchmarks.tables --out FOLDER --data EVENTS.parquet [--items ITEMS.parquet]
    python -m benchmarks.tables --out FOLDER --simulate [--users 20000 --catalogue 1000 --days 30]

Targets are ranked among what was shown where the log knows it (the paper's Pinterest setting), else
among all items (its XING setting). Behind our value stands the paper's in brackets. Neither of the
paper's logs is public in the form it used, so values are never comparable one to one: the order of
the rows and their distance to HierTCN are. What was measured stays in the folder: a run that was
stopped continues, and more rows or tables cost only themselves.
"""

import argparse
import logging
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch

from benchmarks import paper_numbers as paper
from benchmarks.tables_data import Log, LogSource, Setting, make_setting, prepare_log
from benchmarks.tables_memory import memory_table
from benchmarks.tables_rows import (
    LOSS_ROWS,
    OPTION_ROWS,
    REGULARIZATION_ROWS,
    ROWS,
    Budget,
    Build,
    RowResult,
    measure,
    reason_without,
)
from hiertcn.errors import HiertcnError, InputError
from hiertcn.evaluation.bootstrap import paired_difference
from hiertcn.evaluation.metrics import metric_title, summarize
from hiertcn.evaluation.oracle import join_oracle
from hiertcn.evaluation.ranking import MASKS, Mask
from hiertcn.events.ingest import IngestOptions
from hiertcn.events.simulate import SimulationOptions
from hiertcn.files import write_json
from hiertcn.training.options import ITEM_VECTOR_KINDS, TrainOptions

TABLES: Final = ("2", "3", "4", "5", "6", "memory", "options")
_METRICS: Final = ("recall@1", "recall@5", "recall@10", "ndcg@10", "mrr", "mrp")
_FIRST: Final = "HierTCN"


def main() -> None:
    """Print the tables."""
    arguments = _parse()
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    try:
        _run(arguments)
    except HiertcnError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(error.exit_code) from None


def _run(arguments: argparse.Namespace) -> None:
    unknown = sorted(set(arguments.rows or []) - set(ROWS))
    if unknown:
        raise InputError(f"--rows names {unknown[0]!r}; expected some of {', '.join(ROWS)}")
    if bool(arguments.data) == arguments.simulate:
        raise InputError("give either --data or --simulate")
    torch.set_num_threads(arguments.threads)
    log = prepare_log(arguments.out / "log", _source(arguments))
    tables = _Tables(log, arguments)
    for name in arguments.tables:
        tables.show(name)
    write_json(arguments.out / "tables.json", tables.values)


class _Tables:
    def __init__(self, log: Log, arguments: argparse.Namespace) -> None:
        self.log, self.arguments = log, arguments
        self.dataset: paper.Dataset = "Pinterest" if log.store.has_impressions else "XING"
        # Among all items the one just seen would win for every ranker by similarity; who chose it
        # again from what was shown meant it.
        usual: Mask = "none" if log.store.has_impressions else "last-item"
        self.mask: Mask = arguments.mask or usual
        self.budget = Budget(
            max_train_seconds=arguments.max_train_seconds,
            train=TrainOptions(
                item_vectors=arguments.item_vectors,
                lanes=32,
                max_steps=arguments.steps,
                max_epochs=arguments.epochs,
                validation_requests=2000,
                seed=arguments.seed,
            ),
        )
        self.values: dict[str, Any] = {"statistics": log.statistics}
        self._settings: dict[tuple[str, float], Setting] = {}

    def show(self, name: str) -> None:
        """Print one table."""
        if name == "2":
            self._comparison("2", "cold", paper.COLD_START.get(self.dataset, {}))
        elif name == "3":
            self._comparison("3", "warm", paper.WARM_START.get(self.dataset, {}))
        elif name == "4":
            self._epochs()
        elif name == "5":
            share = paper.LOSS_TRAINING_SHARE
            self._ablation("5", "objective functions", LOSS_ROWS, "hinge", paper.LOSSES, share)
        elif name == "6":
            rows = REGULARIZATION_ROWS
            self._ablation("6", "regularization", rows, "none", paper.REGULARIZATION, 1.0)
        elif name == "options":
            self._options()
        else:
            setting = self._setting("cold")
            self.values["memory"] = memory_table(setting.training, setting.table.dim)

    def _comparison(self, number: str, start: Any, numbers: paper.Numbers) -> None:
        setting = self._setting(start)
        results = self._measure(ROWS, setting)
        print(f"\n## Table {number}: {setting.note}")
        self._requests_line(setting, results, self.dataset)
        self._print(number, results, numbers, _FIRST, setting)
        self._missing(numbers, results)
        self._oracle(setting, results)

    def _ablation(
        self,
        number: str,
        title: str,
        rows: Mapping[str, Build],
        first: str,
        numbers: Mapping[paper.Dataset, paper.Numbers],
        share: float,
    ) -> None:
        setting = self._setting("cold", share)
        results = self._measure(rows, setting, only_chosen=False)
        print(f"\n## Table {number}: {title} of HierTCN; {setting.note}")
        dataset = next(iter(numbers))
        self._requests_line(setting, results, dataset)
        if dataset != self.dataset:
            print(
                f"The paper's table is of {dataset}, whose targets are ranked "
                f"{'among what was shown' if dataset == 'Pinterest' else 'among all items'}; ours "
                "are not, so only the order of the rows can be compared."
            )
        self._print(number, results, numbers[dataset], first, setting)

    def _options(self) -> None:
        setting = self._setting("warm")
        left_out = {name: reason_without(name, setting) for name in OPTION_ROWS}
        rows = {name: OPTION_ROWS[name] for name, reason in left_out.items() if reason is None}
        results = self._measure(rows, setting, only_chosen=False)
        print(f"\n## HierTCN's options, one at a time (not in the paper); {setting.note}")
        self._requests_line(setting, results, self.dataset)
        self._print("options", results, {}, _FIRST, setting)
        for name, reason in left_out.items():
            if reason is not None:
                print(f"Not measured: {name}; {reason}.")

    def _epochs(self) -> None:
        results = self._measure(ROWS, self._setting("cold"))
        trained = {name: row.facts for name, row in results.items() if "epoch_seconds" in row.facts}
        print(
            "\n## Table 4: time of one training epoch, in brackets the paper's (Pinterest, GPU)\n"
            "Seconds depend on machine and log; the ratio to HierTCN can be compared, where "
            "parameters are alike.\n"
        )
        base = trained.get(_FIRST, {}).get("epoch_seconds", float("nan"))
        rows = []
        for name, facts in trained.items():
            theirs = paper.EPOCH_SECONDS.get(name)
            ratio = "" if theirs is None else f" ({theirs / paper.EPOCH_SECONDS[_FIRST]:.2f})"
            rows.append(
                [
                    name,
                    f"{facts['parameters']:,}",
                    f"{facts['interactions_per_s']:,.0f}",
                    f"{facts['epoch_seconds']:.1f}" + ("" if theirs is None else f" ({theirs})"),
                    f"{facts['epoch_seconds'] / base:.2f}{ratio}",
                ]
            )
        _print_rows(("row", "parameters", "interactions/s", "epoch, s", "epoch / HierTCN's"), rows)
        self._missing({name: {} for name in paper.EPOCH_SECONDS}, results)
        self.values["4"] = trained

    def _print(
        self,
        number: str,
        results: Mapping[str, RowResult],
        numbers: paper.Numbers,
        first: str,
        setting: Setting,
    ) -> None:
        users, rows, values = setting.requests.user, [], {}
        for name, row in results.items():
            metrics = summarize(row.ranks, row.pool_size, users)
            cells = [name]
            for metric in _METRICS:
                theirs = numbers.get(name, {}).get(metric)
                told = "" if theirs is None else f" ({theirs:.3f})"
                cells.append(f"{metrics.value(metric):.4f}{told}")
            values[name] = {**metrics.to_dict(), **row.facts}
            difference = ""
            if name != first and first in results:
                other = results[first]
                found = paired_difference(other.ranks, row.ranks, row.pool_size, users)
                difference = f"{found.mean:+.4f} [{found.low:+.4f}, {found.high:+.4f}]"
                values[name]["first_minus_row_mrr"] = found.to_list()
            rows.append([*cells, difference, _budget_used(row.facts)])
        titles = [metric_title(metric) for metric in _METRICS]
        print()
        _print_rows(("row", *titles, f"MRR of {first} minus row's", "training"), rows)
        self.values[number] = values

    def _oracle(self, setting: Setting, results: Mapping[str, RowResult]) -> None:
        folder = self.log.folder / "simulated" / "oracle"
        if not folder.exists() or not results:
            return
        oracle = join_oracle(folder, self.log.store, setting.requests, self.log.index)
        pool_size = next(iter(results.values())).pool_size
        same = (oracle.rank > 0) & (oracle.candidates == pool_size)
        if not same.any():
            return
        best = float(np.mean(1.0 / oracle.rank[same]))
        shares = ", ".join(
            f"{name} {np.mean(1.0 / row.ranks[same]) / best:.1%}" for name, row in results.items()
        )
        print(
            f"Best possible MRR (the simulator's own probabilities) on the {int(same.sum()):,} "
            f"requests with equal candidates: {best:.4f}; reached: {shares}."
        )

    def _requests_line(
        self, setting: Setting, results: Mapping[str, RowResult], dataset: paper.Dataset
    ) -> None:
        pools = [float(row.pool_size.mean()) for row in results.values()]
        where = "items shown" if self.dataset == "Pinterest" else "all items"
        print(
            f"{len(setting.requests):,} requests of {len(np.unique(setting.requests.user)):,} "
            f"users, against {where}, {pools[0] if pools else float('nan'):.1f} candidates on "
            f"average, mask {self.mask}; in brackets the paper's {dataset} (its log is another "
            "one: compare the order and the distances, not the values)."
        )

    def _missing(self, numbers: paper.Numbers, results: Mapping[str, RowResult]) -> None:
        missing = [name for name in numbers if name not in results]
        if missing:
            print(f"Rows of the paper that were not measured here: {', '.join(missing)}.")
        if not numbers:
            print(f"The paper has no such table for {self.dataset}: nothing to compare with.")

    def _measure(
        self, rows: Mapping[str, Build], setting: Setting, *, only_chosen: bool = True
    ) -> dict[str, RowResult]:
        chosen = self.arguments.rows if only_chosen and self.arguments.rows else list(rows)
        output = self.arguments.out / "rows"
        return {
            name: measure(name, build, setting, self.budget, output, self.mask)
            for name, build in rows.items()
            if name in chosen
        }

    def _setting(self, start: Any, share: float = 1.0) -> Setting:
        key = (start, share)
        if key not in self._settings:
            self._settings[key] = make_setting(
                self.log,
                start,
                max_requests=self.arguments.max_requests,
                seed=self.arguments.seed,
                training_share=share,
            )
        return self._settings[key]


def _budget_used(facts: Mapping[str, Any]) -> str:
    return f"{facts['steps']:,} steps, {facts['stopped']}" if "steps" in facts else ""


def _print_rows(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    print("| " + " | ".join(titles) + " |")
    print("|" + "---|" * len(titles))
    for row in rows:
        print("| " + " | ".join(row) + " |")


def _source(arguments: argparse.Namespace) -> LogSource:
    given = IngestOptions()
    options = replace(
        given,
        event_types=tuple(arguments.event_type or ()),
        item_filter=arguments.item_filter,
        timestamp_unit=arguments.timestamp_unit,
        session_gap_s=arguments.session_gap,
        min_item_interactions=arguments.min_item_interactions,
        min_user_interactions=arguments.min_user_interactions,
    )
    return LogSource(
        events=arguments.data,
        items=arguments.items,
        ingest=options,
        simulation=SimulationOptions(
            users=arguments.users,
            items=arguments.catalogue,
            days=arguments.days,
            seed=arguments.seed,
        ),
        item_dim=arguments.item_dim,
        encoder_epochs=arguments.encoder_epochs,
    )


def _parse() -> argparse.Namespace:
    given = IngestOptions()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--out", type=Path, required=True, help="folder for everything that is kept")
    add("--data", default="", help="events: CSV or parquet, a file, folder or URL")
    add("--items", default="", help="items file or URL")
    add("--simulate", action="store_true", help="simulate a log instead")
    add("--users", type=int, default=20_000, help="users to simulate")
    add("--catalogue", type=int, default=1_000, help="items to simulate")
    add("--days", type=int, default=30, help="days to simulate")
    add("--event-type", action="append", help="event type to keep; repeat for several")
    add("--item-filter", default="", help="keep items where this holds")
    add("--timestamp-unit", default="auto", help="unit of integer timestamps")
    add("--session-gap", type=float, default=given.session_gap_s, help="seconds")
    add("--min-item-interactions", type=int, default=given.min_item_interactions)
    add("--min-user-interactions", type=int, default=given.min_user_interactions)
    add("--tables", nargs="+", choices=TABLES, default=list(TABLES))
    add("--rows", nargs="+", help=f"only these rows of Tables 2 to 4: {', '.join(ROWS)}")
    add("--steps", type=int, default=0, help="most steps of a network; 0 for no limit")
    add("--epochs", type=int, default=20, help="most epochs of a network")
    add("--max-train-seconds", type=float, default=0.0, help="of a network; 0 for no limit")
    add("--max-requests", type=int, default=20_000, help="ask about a sample of this size")
    add("--mask", choices=MASKS, help="items ranked last; last-item without impressions")
    add("--item-vectors", choices=ITEM_VECTOR_KINDS, default="frozen")
    add("--item-dim", type=int, default=64, help="width of the item vectors")
    add("--encoder-epochs", type=int, default=5, help="most epochs of the item encoder")
    add("--threads", type=int, default=1, help="threads of the networks' arithmetic")
    add("--seed", type=int, default=0)
    return parser.parse_args()


if __name__ == "__main__":
    main()
