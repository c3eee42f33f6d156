"""One expert of 16 lost: are all rows answered, what does it cost, and is the model the same after repair?

The fraud net on raw columns of IEEE-CIS, trained as in `moe_routers`. In turn each expert of each layer gets weights
that are not numbers; the layer fences it off and its rows go to other experts. AUC and average precision are of every
sixth row of the test period. After `restore` the scores have to be the same to the bit.

    assay bench moe_failure [--json]
"""

import statistics
import sys
from pathlib import Path

import numpy as np
import torch
from assay_pipelines.fraud.train import net_logits
from assay_platform.moe import MoELayer
from sklearn.metrics import average_precision_score, roc_auc_score

sys.path.insert(0, str(Path(__file__).parent))
from _report import finish, row
from moe_routers import NUM_EXPERTS, Fraud


def main() -> None:
    """Break and repair."""
    task = Fraud()
    net = task.fit(task.net("softmax", 0), 0, lambda: None)
    test = task.test.take(torch.arange(0, len(task.test), 6))
    labels = test.labels.numpy() > 0.5
    fences = net.backbone.guard()
    healthy = net_logits(net, test.rows)
    auc, ap = roc_auc_score(labels, healthy), average_precision_score(labels, healthy)
    lost_auc, lost_ap, answered = [], [], 0
    for layer in net.backbone.layers:
        assert isinstance(layer, MoELayer)
        for expert in range(layer.num_experts):
            weights = {name: value.clone() for name, value in layer.pool[expert].state_dict().items()}
            with torch.no_grad():
                layer.pool[expert].w_out_HD.fill_(float("nan"))
            logits = net_logits(net, test.rows)
            answered += int(np.isfinite(logits).sum())
            lost_auc.append(auc - roc_auc_score(labels, logits))
            lost_ap.append(ap - average_precision_score(labels, logits))
            layer.restore(expert, weights)
            assert np.array_equal(net_logits(net, test.rows), healthy), "a restored expert answers differently"
    assert sum(f.num_failures for f in fences) == len(lost_auc)
    share = answered / (len(lost_auc) * len(labels))
    rows = [
        row("rows answered with an expert lost", share, "share", limit=1.0, limit_name="all", higher_is_better=True,
            runs=len(lost_auc)),
        row("AUC cost of a lost expert, mean", statistics.mean(lost_auc), "AUC", peer=auc, peer_name="healthy AUC",
            runs=len(lost_auc), worst=round(max(lost_auc), 5), experts=NUM_EXPERTS),
        row("AP cost of a lost expert, mean", statistics.mean(lost_ap), "AP", peer=ap, peer_name="healthy AP",
            runs=len(lost_ap), worst=round(max(lost_ap), 5), experts=NUM_EXPERTS),
    ]  # fmt: skip
    finish("moe_failure", rows)
    print(f"worst: AUC {max(lost_auc):.5f}, AP {max(lost_ap):.5f}; restored to the bit")


if __name__ == "__main__":
    main()
