"""Numbers of trained parameters of HierTCN and of the networks it is compared with.

    python -m benchmarks.parameter_counts [--item-dim 128]

Prints the count of each network as the paper describes it (section 4.2.3) and with the width that
matches HierTCN's count; the paper only says that the counts are very similar, here they are within
5%. Item vectors are not counted: they are inputs, and the same for all.
"""

import argparse
from typing import Final

from models.hiertcn import HierTCN, HierTCNConfig
from models.sequence.config import NetworkConfig
from models.sequence.gru import GRUConfig
from models.sequence.hierarchical import HierGRUConfig, HRNNConfig
from models.sequence.networks import count_parameters, matched_config
from models.sequence.sasrec import SASRecConfig
from models.sequence.tcn import FlatTCNConfig

TOLERANCE: Final = 0.05


def paper_configs(item_dim: int) -> dict[str, NetworkConfig]:
    """Return each network in the paper's setting; SASRec, which it does not have, in its own."""
    return {
        "HierGRU": HierGRUConfig(item_dim=item_dim),
        "HRNN-Init": HRNNConfig(item_dim=item_dim),
        "HRNN-All": HRNNConfig(item_dim=item_dim, feeds_every_position=True),
        "TCN": FlatTCNConfig(item_dim=item_dim),
        "GRU": GRUConfig(item_dim=item_dim),
        "SASRec": SASRecConfig(item_dim=item_dim),
    }


def hiertcn_parameters(item_dim: int) -> int:
    """Return the number of weights of HierTCN in the paper's setting."""
    return sum(
        weights.numel() for weights in HierTCN(HierTCNConfig(item_dim=item_dim)).parameters()
    )


def main() -> None:
    """Print the counts."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--item-dim", type=int, default=128, help="width of the item vectors")
    item_dim = parser.parse_args().item_dim
    wanted = hiertcn_parameters(item_dim)
    print("| network | as described | ratio | width when matched | parameters | ratio |")
    print("|---|---|---|---|---|---|")
    print(f"| HierTCN | {wanted:,} | 1.00 | | {wanted:,} | 1.00 |")
    for name, config in paper_configs(item_dim).items():
        described = count_parameters(config)
        matched = matched_config(config, wanted)
        width = getattr(matched, "filters", 0) or getattr(matched, "hidden", 0)
        count = count_parameters(matched)
        print(
            f"| {name} | {described:,} | {described / wanted:.2f} | {width} | {count:,} "
            f"| {count / wanted:.3f} |"
        )


if __name__ == "__main__":
    main()
