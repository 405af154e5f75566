"""Step 7: measure the model beside baselines and the serving release, and judge it."""

from kfp.dsl import HTML, Artifact, Dataset, Input, Metrics, Model, Output


def evaluate(
    lineage: str,
    candidates: str,
    max_requests: int,
    tolerance: float,
    oracle: str,
    seed: int,
    repository: str,
    parent_release: int,
    snapshot: Input[Dataset],
    item_index: Input[Artifact],
    graph: Input[Artifact],
    item_encoder: Input[Model],
    sessions: Input[Dataset],
    training_table: Input[Artifact],
    model: Input[Model],
    evaluation: Output[Artifact],
    report: Output[HTML],
    metrics: Output[Metrics],
) -> bool:
    """Rank the newest sessions' interactions and decide whether the model may serve.

    Measured are the test sessions (the newest tenth), or, where the serving release has already
    seen some of those, the ones that are newer than it: neither model then knows what is asked.

    Args:
        lineage: lineage of the model, and so of everything it was made from.
        candidates: auto, impressions, catalogue, or sample:N for N random items.
        max_requests: evaluate on a sample of at most this many interactions.
        tolerance: share of the serving release's MRR that may be lost.
        oracle: the simulator's oracle folder, or empty.
        seed: seed of the sample.
        repository: release repository that holds the serving release.
        parent_release: serving release, 0 if none.
        snapshot: the ingested log, for its statistics.
        item_index: id <-> row.
        graph: the item graph, for its statistics.
        item_encoder: the encoder, for its training curve.
        sessions: the session store.
        training_table: the item table as of the start of the test sessions.
        model: the trained model.
        evaluation: ``evaluation.json`` and ``gate.json``.
        report: one self-contained HTML page.
        metrics: the main metrics, for Kubeflow's page of the run.

    Returns:
        Whether the gate lets the model pass.
    """
    from components.step import step

    with step("evaluate", locals()):
        from pathlib import Path

        import numpy as np
        import pyarrow as pa
        from numpy.typing import NDArray

        from hiertcn.evaluation.evaluate import evaluate as rank_all
        from hiertcn.evaluation.examples import ExampleOptions
        from hiertcn.evaluation.gallery import gallery_section
        from hiertcn.evaluation.gate import decide
        from hiertcn.evaluation.item_texts import item_texts
        from hiertcn.evaluation.oracle import join_oracle
        from hiertcn.evaluation.protocol import Ranker, build_requests
        from hiertcn.evaluation.report import write_report
        from hiertcn.evaluation.results import kfp_metrics
        from hiertcn.evaluation.term_section import term_section
        from hiertcn.files import read_json, whole_directory, write_json
        from hiertcn.items.index import IdIndex
        from hiertcn.items.neighbor_building import int8_cost
        from hiertcn.items.table import ItemTable
        from hiertcn.release.repository import ReleaseRepository
        from hiertcn.sessions.split import split_by_time
        from hiertcn.sessions.store import SessionStore
        from hiertcn.sessions.transitions import TransitionTable, count_transitions
        from models.baselines import MV, MaxItem
        from models.counting import Popularity
        from models.hiertcn import load_hiertcn
        from models.network_ranker import NetworkRanker

        index = IdIndex.open(Path(item_index.path))
        table = ItemTable.open(Path(training_table.path))
        store = SessionStore.open(Path(sessions.path))
        releases = ReleaseRepository(repository)
        split = split_by_time(store)
        start_us = split.test_start_us
        requests = build_requests(store, start_us, max_requests=max_requests, seed=seed)
        unseen_us = start_us
        if parent_release:
            unseen_us = releases.manifest(parent_release).watermark_us + 1
            newer = build_requests(store, unseen_us, max_requests=max_requests, seed=seed)
            if unseen_us > start_us and len(newer):
                start_us, requests = unseen_us, newer
        trained = Path(model.path)
        network = load_hiertcn(trained)
        tuned = trained / "item_table"
        vectors = ItemTable.open(tuned) if tuned.exists() else table
        transitions, terms = None, None
        if network.terms is not None:
            transitions = TransitionTable.open(trained / "transitions")
            if start_us > split.test_start_us:
                # As fresh as the serving release's, and as what this one would serve with.
                transitions = count_transitions(store, len(table), end_us=start_us)
            gate = network.terms.gate
            terms = term_section(
                network.terms.names, gate.weight.detach().numpy(), gate.bias.detach().numpy()
            )
        rankers: list[Ranker] = [NetworkRanker(network, store, vectors, transitions=transitions)]
        if network.terms is not None:
            without_terms = load_hiertcn(trained)
            without_terms.terms = None
            rankers.append(
                NetworkRanker(without_terms, store, vectors, name="HierTCN without terms")
            )
        rankers += [
            Popularity(store, len(table), before_us=start_us).fit(store),
            MV(store, table),
            MaxItem(store, table),
        ]
        serving = f"release {parent_release}" if parent_release else None
        if serving:
            parent = releases.path(parent_release)
            serving_network = load_hiertcn(parent / "model")
            serving_table = ItemTable.open(parent / "item_table")
            counted = None
            if serving_network.terms is not None and start_us < unseen_us:
                # Its own have counted the very sessions that are asked about.
                counted = count_transitions(store, len(serving_table), end_us=start_us)
            elif serving_network.terms is not None:
                counted = TransitionTable.open(parent / "user_states" / "transitions")
            rankers.append(
                NetworkRanker(
                    serving_network,
                    store,
                    serving_table,
                    transitions=counted,
                    name=serving,
                )
            )

        def name_users(users: NDArray[np.int64]) -> list[str]:
            names: list[str] = store.user_ids.take(pa.array(users)).to_pylist()
            return names

        labels = item_texts(index, Path(snapshot.path) / "items.parquet")
        result = rank_all(
            rankers,
            store,
            requests,
            items=len(table),
            candidates=candidates,
            oracle=join_oracle(Path(oracle), store, requests, index) if oracle else None,
            examples=ExampleOptions(
                users=3,
                item_labels=labels,
                user_labels=name_users,
            ),
            seed=seed,
        )
        decision = decide(result, serving=serving, tolerance=tolerance)
        with whole_directory(Path(evaluation.path)) as folder:
            write_json(folder / "evaluation.json", result.to_dict())
            write_json(folder / "gate.json", decision.to_dict())
        for name, value in kfp_metrics(result).items():
            metrics.log_metric(name, value)
        write_report(
            Path(report.path),
            facts={
                "events": f"{snapshot.metadata['events']:.0f}",
                "users": f"{snapshot.metadata['users']:.0f}",
                "items": f"{snapshot.metadata['items']:.0f}",
                "snapshot": snapshot.metadata["hash"][:16],
                "serving release": parent_release or "none",
            },
            evaluation=result,
            gate=decision,
            serving=serving,
            data_statistics=read_json(Path(snapshot.path) / "statistics.json"),
            graph_statistics=read_json(Path(graph.path) / "statistics.json"),
            encoder_curve=read_json(Path(item_encoder.path) / "curve.json"),
            model_curve=read_json(trained / "curve.json"),
            terms=terms,
            gallery=gallery_section(
                table.vectors[:, :-1],
                np.bincount(
                    store.item_rows[np.asarray(store.timestamps_us) < split.test_start_us],
                    minlength=len(table),
                ),
                labels,
                quantization=int8_cost(table, seed=seed) if len(table) <= 1_000_000 else None,
                seed=seed,
            ),
        )
    return decision.passed
