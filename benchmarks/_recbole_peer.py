"""LightGCN or SASRec of the public library RecBole, trained on a given split and ranked in full.

    python _recbole_peer.py SPLIT.npz OUT.npz --model LightGCN|SASRec --params JSON --seed N [--device cpu|cuda] ...

Data set, augmentation, loader, sampler, model and trainer are RecBole's, as its quick start joins them; only the
ranking of everything and NDCG are here, so that all peers are measured alike. Needs recbole, nothing of Assay.

SPLIT: user, item (codes), time_us of all events; fit, validation: row numbers; num_users, num_items; wv_indptr,
wv_indices: what validation wants of each user. --params: RecBole's names. Without --everything it learns from `fit`,
stops early on NDCG@10 of validation, and the lists are of the best epoch; with it, from both for all `epochs`.

OUT: top (U, 20) item codes, best first, without what was learned from; ndcg (validation); epochs (of the lists),
epochs_run, epoch_seconds (of each, training alone), seconds (of all), stopped: early, time or end.
"""

# U users, I items

import argparse
import json
import logging
import os
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import scipy.sparse as sp
import torch
from numpy.typing import NDArray

# ruff: noqa: E402 - these have to be there before the library is imported
# What RecBole 1.2.1 takes from NumPy 1 and SciPy before 1.13.
for _name, _kind in {"float": np.float64, "float_": np.float64, "complex_": np.complex128, "unicode_": np.str_}.items():
    setattr(np, _name, _kind)
if not hasattr(sp.dok_matrix, "_update"):
    sp.dok_matrix._update = lambda self, data: self._dict.update(data)

from recbole.config import Config
from recbole.data.dataloader import TrainDataLoader
from recbole.data.interaction import Interaction
from recbole.data.utils import create_dataset
from recbole.sampler import Sampler
from recbole.trainer import Trainer
from recbole.utils import ModelType, get_model, init_seed

_DEPTH, _SHOWN, _USERS_A_TIME = 20, 10, 256
Ints = NDArray[np.int64]


class Wanted(NamedTuple):
    """CSR of what each user takes later."""

    indptr: Ints
    indices: Ints

    def ndcg(self, top: Ints) -> float:
        """Mean NDCG@10 of the users with something to find; binary gains."""
        discount = 1.0 / np.log2(np.arange(2, 2 + _SHOWN))
        found = []
        for user in np.flatnonzero(np.diff(self.indptr)):
            wanted = self.indices[self.indptr[user] : self.indptr[user + 1]]
            hit = np.isin(top[user, :_SHOWN], wanted)
            found.append((hit * discount).sum() / discount[: len(wanted)].sum())
        return float(np.mean(found))


def ranked(model: Any, dataset: Any, user: Ints, item: Ints, num_users: int, num_items: int) -> Ints:
    """(U, 20) best items of everybody but those learned from, by the library's full_sort_predict.

    user, item: what was learned from, a user's together and in order of time.
    """
    model.eval()
    known_users, known_items = np.unique(user), np.unique(item)
    user_id, item_id = np.zeros(num_users, dtype=np.int64), np.zeros(num_items, dtype=np.int64)  # 0: its padding
    user_id[known_users] = dataset.token2id(dataset.uid_field, known_users.astype(str))
    item_id[known_items] = dataset.token2id(dataset.iid_field, known_items.astype(str))
    begins = np.searchsorted(user, np.arange(num_users + 1))
    asked = {dataset.uid_field: user_id}
    if dataset.config["MODEL_TYPE"] == ModelType.SEQUENTIAL:
        longest = dataset.config["MAX_ITEM_LIST_LENGTH"]
        past, length = np.zeros((num_users, longest), dtype=np.int64), np.ones(num_users, dtype=np.int64)
        for one in known_users:
            taken = item[begins[one] : begins[one + 1]][-longest:]
            past[one, : len(taken)], length[one] = item_id[taken], len(taken)
        asked |= {dataset.item_id_list_field: past, dataset.item_list_length_field: length}
    top = np.empty((num_users, _DEPTH), dtype=np.int64)
    for start in range(0, num_users, _USERS_A_TIME):
        users = np.arange(start, min(start + _USERS_A_TIME, num_users))
        part = Interaction({name: torch.from_numpy(value[users]) for name, value in asked.items()})
        with torch.no_grad():
            of_ids = model.full_sort_predict(part.to(model.device)).view(len(users), -1).float().cpu().numpy()
        scores = np.where(item_id > 0, of_ids[:, item_id], -np.inf)  # (users, I)
        seen = slice(begins[users[0]], begins[users[-1] + 1])
        scores[user[seen] - start, item[seen]] = -np.inf
        top[users] = np.argsort(-scores, axis=1, kind="stable")[:, :_DEPTH]
    return top


class MeasuredTrainer(Trainer):
    """RecBole's trainer; validation ranks everything for all that is wanted."""

    def __init__(self, config: Config, model: Any, rank: Callable[[], Ints], wanted: Any, end: float) -> None:
        super().__init__(config, model)
        self._rank, self._wanted, self._end = rank, wanted, end
        self.epoch_seconds: list[float] = []
        self.best: tuple[float, int, Ints | None] = (-np.inf, 0, None)  # NDCG, epochs, lists

    def _train_epoch(self, *args: Any, **options: Any) -> Any:
        began = time.perf_counter()
        loss = super()._train_epoch(*args, **options)
        self.epoch_seconds.append(time.perf_counter() - began)
        return loss

    def _valid_epoch(self, *args: Any, **options: Any) -> tuple[float, dict[str, float]]:
        top = self._rank()
        ndcg = self._wanted.ndcg(top)
        if ndcg > self.best[0]:
            self.best = ndcg, len(self.epoch_seconds), top
        if time.perf_counter() > self._end:
            raise TimeoutError
        return ndcg, {"ndcg@10": ndcg}


def library_config(call: argparse.Namespace, folder: Path) -> Config:
    """The library's configuration for the data set `events`, all of it to learn from."""
    sequential = call.model == "SASRec"
    settings = {
        "data_path": str(folder), "checkpoint_dir": str(folder / "saved"), "seed": call.seed, "show_progress": False,
        "load_col": {"inter": ["user_id", "item_id", "timestamp"]}, "use_gpu": call.device == "cuda", "gpu_id": "0",
        "eval_args": {"split": {"RS": [1, 0, 0]}, "group_by": "user", "order": "TO" if sequential else "RO",
                      "mode": "full"},
        "metrics": ["NDCG"], "valid_metric": "NDCG@10", "eval_step": call.every, "stopping_step": call.patience,
        **({"train_neg_sample_args": None} if sequential else {}),
    }  # fmt: skip
    return Config(model=call.model, dataset="events", config_dict={**settings, **json.loads(call.params)})


def train(call: argparse.Namespace) -> dict[str, Any]:
    """What the module's docstring says of OUT."""
    split = dict(np.load(call.split))
    rows = np.r_[split["fit"], split["validation"]] if call.everything else split["fit"]
    rows = rows[np.lexsort((rows, split["time_us"][rows], split["user"][rows]))]
    user, item = split["user"][rows], split["item"][rows]
    wanted = None if call.everything else Wanted(split["wv_indptr"], split["wv_indices"])
    folder = Path.cwd() / "events"
    folder.mkdir()
    # The library keeps times in 32 bits, which seconds since 1970 do not fit: their order stands for them.
    lines = ["user_id:token\titem_id:token\ttimestamp:float"]
    lines += [f"{u}\t{i}\t{order}" for order, (u, i) in enumerate(zip(user, item, strict=True))]
    (folder / "events.inter").write_text("\n".join(lines) + "\n")
    config = library_config(call, folder.parent)
    init_seed(config["seed"], config["reproducibility"])
    dataset = create_dataset(config).build()[0]
    negative = config["train_neg_sample_args"]["distribution"]
    sampler = None if negative == "none" else Sampler(["train"], [dataset], negative, 1.0).set_phase("train")
    loader = TrainDataLoader(config, dataset, sampler, shuffle=config["shuffle"])
    init_seed(config["seed"], config["reproducibility"])
    model = get_model(call.model)(config, dataset).to(config["device"])
    rank = partial(ranked, model, dataset, user, item, int(split["num_users"]), int(split["num_items"]))
    began, stopped = time.perf_counter(), "time"
    trainer = MeasuredTrainer(config, model, rank, wanted, began + call.max_seconds)
    with suppress(TimeoutError):
        trainer.fit(loader, valid_data=wanted, verbose=False, saved=False)
        stopped = "end" if len(trainer.epoch_seconds) == config["epochs"] else "early"
    ndcg, epochs, top = trainer.best if wanted else (np.nan, len(trainer.epoch_seconds), rank())
    return {"top": top, "ndcg": ndcg, "epochs": epochs, "epochs_run": len(trainer.epoch_seconds), "stopped": stopped,
            "epoch_seconds": np.array(trainer.epoch_seconds), "seconds": time.perf_counter() - began}  # fmt: skip


def main() -> None:
    """Train, rank, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("split", "out"):
        parser.add_argument(name, type=lambda path: Path(path).resolve())
    parser.add_argument("--model", choices=["LightGCN", "SASRec"], required=True)
    parser.add_argument("--params", required=True, help="JSON")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--everything", action="store_true", help="learn from fit + validation")
    for name, value, text in (
        ("seed", 0, "of everything"), ("threads", 1, "of PyTorch"), ("every", 1, "epochs between measurements"),
        ("patience", 10, "measurements without a better one"), ("max-seconds", 1e9, "stop at the next measurement"),
    ):  # fmt: skip
        parser.add_argument(f"--{name}", type=type(value), default=value, help=text)
    call = parser.parse_args()
    torch.set_num_threads(call.threads)
    logging.getLogger().setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory() as folder:  # the library writes logs where it stands
        os.chdir(folder)
        found = train(call)
    np.savez_compressed(call.out, **found)
    print(json.dumps({name: value for name, value in found.items() if name not in ("top", "epoch_seconds")}))


if __name__ == "__main__":
    main()
