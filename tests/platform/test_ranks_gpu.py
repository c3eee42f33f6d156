"""Two GPUs that train one net through NCCL: they learn what one learns."""

from pathlib import Path

import pytest
import torch
from assay_platform.models.encoding import EncodedRows
from assay_platform.models.fraud import FraudNet, FraudNetConfig
from assay_platform.moe import BackboneConfig
from assay_platform.training import ALONE, Ranks, TrainConfig, fit
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

DEVICE, NUM_RANKS = "cuda", 2
# An odd number of rows a batch, so that shares are of different sizes.
NUM_STEPS, NUM_ROWS = 6, 6 * 101
CONFIG = FraudNetConfig(num_bins=4, backbone=BackboneConfig(width=32, hidden=32, num_experts=4, dropout=0.0))


def train(ranks: Ranks) -> tuple[dict[str, Tensor], Tensor, list[float]]:
    """Weights and routers' state, the loss of this rank's share of every batch, and the metric of every epoch."""
    torch.manual_seed(0)
    drawn = torch.Generator().manual_seed(0)
    values, codes = torch.randn(NUM_ROWS, 5, generator=drawn), torch.randint(7, (NUM_ROWS, 2), generator=drawn)
    labels = (values[:, 0] * values[:, 1] + 0.5 * (codes[:, 0] == 3) > 0.5).float().to(DEVICE)
    rows = EncodedRows(values, codes).to(DEVICE)
    net = FraudNet(torch.linspace(-2, 2, 5).repeat(5, 1), (7, 7), CONFIG).to(DEVICE)
    losses: list[Tensor] = []

    def loss(part: Tensor) -> Tensor:
        mine = part[ranks.share(len(part))]
        logits, balance = net(rows.rows(mine))
        likelihood = binary_cross_entropy_with_logits(logits, labels[mine], reduction="sum")
        total: Tensor = likelihood / len(part) + balance * (len(mine) / len(part))
        losses.append(total.detach())
        return total

    @torch.inference_mode()
    def evaluate() -> float:
        return -binary_cross_entropy_with_logits(net(rows)[0], labels).item()

    fitted = fit(
        net,
        batches=lambda _: torch.randperm(NUM_ROWS, generator=drawn).to(DEVICE).tensor_split(NUM_STEPS),
        num_batches=NUM_STEPS,
        loss=loss,
        evaluate=evaluate,
        config=TrainConfig(num_epochs=3, learning_rate=2e-3),
        ranks=ranks,
    )
    return net.cpu().state_dict(), torch.stack(losses).cpu(), fitted.history


def _rank(number: int, folder: str) -> None:
    torch.cuda.set_device(number)
    torch.distributed.init_process_group("nccl", init_method=f"file://{folder}/sync", rank=number, world_size=NUM_RANKS)
    torch.save(train(Ranks.here()), Path(folder) / f"{number}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < NUM_RANKS, reason="fewer than two GPUs")
@pytest.mark.timeout(300)
def test_two_gpus_learn_what_one_learns(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(_rank, args=(str(tmp_path),), nprocs=NUM_RANKS)
    expected, losses, history = train(ALONE)
    found = [torch.load(tmp_path / f"{number}.pt", weights_only=True) for number in range(NUM_RANKS)]
    torch.testing.assert_close(found[0][1] + found[1][1], losses, rtol=1e-3, atol=1e-4)
    for state, _, of_rank in found:
        assert of_rank == pytest.approx(history, rel=1e-3, abs=1e-4)
        assert state.keys() == expected.keys()
        for name, value in state.items():
            torch.testing.assert_close(value, expected[name], rtol=1e-3, atol=1e-4, msg=name)
