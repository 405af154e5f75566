"""HierTCN under the comparison protocol: the paper's configuration and the `best` one.

    python -m benchmarks.best_rows --data FOLDER --case online_retail --output FOLDER

Choosing happens on the validation phase: a network is trained there, and the scoring terms are
fitted on the validation sessions. For the test phase the network is trained anew on everything
before the test (each of the seeds), with the terms as they were fitted. Ranks are kept as ``.npy``,
one file a row and seed, so that later runs can pair them with other methods'; finished rows are
skipped.
"""

import argparse
import dataclasses
import json
import time
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch

from benchmarks.protocol_data import CASES, Phase, ProtocolCase, load_case
from benchmarks.protocol_ranks import metrics, rank
from benchmarks.protocol_vectors import ITEM_VECTORS, Start, first_vectors
from hiertcn.files import write_json
from hiertcn.items.table import ItemTable
from hiertcn.sessions import live_counts, memory
from hiertcn.sessions.request_features import FEATURES
from hiertcn.sessions.split import Split
from hiertcn.sessions.transitions import TransitionTable, count_transitions
from hiertcn.training.checkpoints import load_weights, save_weights
from hiertcn.training.hiertcn import train_hiertcn
from hiertcn.training.item_vectors import ITEM_TABLE_FOLDER, as_vectors
from hiertcn.training.options import TrainOptions
from hiertcn.training.term_fitting import fit_terms
from models.hiertcn import HierTCN, HierTCNConfig, load_hiertcn
from models.network_ranker import NetworkRanker

_END_OF_TIME_US: Final = 1 << 62


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setting:
    """A network, how it is trained, where its item vectors start, and which terms are mixed in."""

    config: HierTCNConfig
    options: TrainOptions
    start: Start = "graph"
    terms: tuple[str, ...] = ()


def settings(case: str, epochs: int) -> dict[str, Setting]:
    """Return the rows of a case: the paper's configuration, and `best` with its ablations."""
    perceptron = HierTCNConfig(
        item_dim=97, hidden=96, gru_layers=1, tcn_blocks=4, kernel=3, filters=96, dropout=0.2
    )
    learned = dataclasses.replace(perceptron, head="linear")
    paper = HierTCNConfig(item_dim=129)
    retail = case.startswith("online_retail")
    options = TrainOptions(
        lanes=4 if retail else 64,
        learning_rate=3e-3,
        schedule="cosine",
        max_epochs=epochs or (6 if retail else 2),
        validation_requests=0,
        random_negatives=8192,
        in_batch_negatives=0,
    )
    return {
        "HierTCN (paper's sizes)": Setting(config=paper, options=options),
        "HierTCN (vectors from random)": Setting(config=learned, options=options, start="random"),
        "HierTCN (Eq. 4's head)": Setting(config=perceptron, options=options),
        "HierTCN": Setting(config=learned, options=options),
        "HierTCN (input dropout)": Setting(
            config=dataclasses.replace(learned, input_dropout=0.2), options=options
        ),
        "HierTCN best": Setting(config=learned, options=options, terms=FEATURES),
        "HierTCN + memory": Setting(config=learned, options=options, terms=memory.FEATURES),
        "HierTCN + freshness": Setting(config=learned, options=options, terms=live_counts.FEATURES),
    }


def main() -> None:
    """Train, rank and print the rows."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of the logs")
    parser.add_argument("--case", choices=CASES, required=True)
    parser.add_argument("--phase", choices=("validation", "test"), default="test")
    parser.add_argument("--rows", nargs="*", help="only these rows")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=0, help="0: the case's own number")
    parser.add_argument(
        "--output", type=Path, required=True, help="where ranks and models are kept"
    )
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    chosen = settings(arguments.case, arguments.epochs)
    for name in arguments.rows or list(chosen):
        for seed in range(arguments.seeds):
            row = _Row(arguments.output, arguments.data, arguments.case, name, chosen[name], seed)
            print(json.dumps(row.run(arguments.phase)), flush=True)


class _Row:
    def __init__(
        self, output: Path, data: Path, case: str, name: str, setting: Setting, seed: int
    ) -> None:
        self._output, self._data, self._case = output, data, case
        self._name, self._setting, self._seed = name, setting, seed

    def run(self, phase: Phase) -> dict[str, Any]:
        """Return the row's metrics, from its file if it was run before."""
        stem = f"{self._case}-{phase}-{self._name.replace(' ', '_')}-{self._seed}"
        result_file = self._output / f"{stem}.json"
        if result_file.exists():
            found: dict[str, Any] = json.loads(result_file.read_text())
            return found
        started = time.monotonic()
        case = load_case(self._data, self._case, phase)
        model, table, summary = self._network(case)
        result: dict[str, Any] = {"row": self._name, "seed": self._seed, "training": summary}
        if self._setting.terms:
            model = self._with_terms(model)
        ranker = NetworkRanker(
            model,
            case.store,
            table,
            transitions=_transitions(case) if model.terms else None,
            name=self._name,
        )
        for mask in ("last-item", "session"):
            ranks = rank(ranker, case, mask)
            np.save(self._output / f"{stem}-{mask}.npy", ranks, allow_pickle=False)
            result[mask] = metrics(ranks, case)
        result["seconds"] = round(time.monotonic() - started, 1)
        write_json(result_file, result)
        return result

    def _network(self, case: ProtocolCase) -> tuple[HierTCN, ItemTable, dict[str, Any]]:
        """Train without terms, or read what another row with the same network trained."""
        config = self._setting.config
        sizes = (config.item_dim, config.filters, config.kernel, config.gru_layers)
        shape = "-".join(map(str, (*sizes, config.head, config.input_dropout)))
        how = f"{self._setting.start}-{self._setting.options.max_epochs}-{self._seed}"
        folder = self._output / "models" / f"{case.name}-{case.phase}-{shape}-{how}"
        torch.manual_seed(self._seed)
        model = HierTCN(config)
        if not (folder / "summary.json").exists():
            options = dataclasses.replace(
                self._setting.options,
                seed=self._seed,
                item_vectors=ITEM_VECTORS[self._setting.start],
            )
            vectors = first_vectors(case, config.item_dim, self._setting.start, self._seed)
            summary = train_hiertcn(
                model,
                case.fit,
                ItemTable.write(folder / "start", vectors, "float32"),
                Split(validation_start_us=_END_OF_TIME_US, test_start_us=_END_OF_TIME_US),
                folder,
                options,
            )
            write_json(folder / "summary.json", summary.to_dict())
        return (
            load_hiertcn(folder),
            ItemTable.open(folder / ITEM_TABLE_FOLDER),
            json.loads((folder / "summary.json").read_text()),
        )

    def _with_terms(self, network: HierTCN) -> HierTCN:
        """Return the network with terms that were fitted where the validation network was asked."""
        terms = self._setting.terms
        file = self._output / "models" / f"{self._case}-{'+'.join(terms)}.safetensors"
        if not file.exists():
            self._fit_terms(file)
        model = _add_terms(network, terms)
        assert model.terms is not None
        load_weights(model.terms, file)
        return model.eval()

    def _fit_terms(self, file: Path) -> None:
        """Fit once for all seeds, with the validation network of the first."""
        case = load_case(self._data, self._case, "validation")
        first = _Row(self._output, self._data, self._case, self._name, self._setting, seed=0)
        network, table, _ = first._network(case)
        fitted = _add_terms(network, self._setting.terms)
        fit_terms(
            fitted,
            case.store,
            as_vectors(table),
            _transitions(case),
            case.requests.session,
            case.requests.interaction,
            self._setting.options,
        )
        assert fitted.terms is not None
        save_weights(fitted.terms, file)


def _transitions(case: ProtocolCase) -> TransitionTable:
    return count_transitions(case.fit, case.store.meta.items)


def _add_terms(model: HierTCN, terms: tuple[str, ...]) -> HierTCN:
    extended = HierTCN(dataclasses.replace(model.config, terms=terms))
    extended.load_state_dict(model.state_dict(), strict=False)
    return extended.eval()


if __name__ == "__main__":
    main()
