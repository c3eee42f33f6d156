"""Fraudsters who adapt: forms of real frauds that could exist, with their features looked up anew.

Used three ways: forms in the clothes of honest payments, and what a short search finds, are trained on; a longer search
measures the model before it may be promoted; benchmarks search harder still.
"""

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from assay_features.batch import History
from assay_features.definitions import FeaturePlan, entity_columns
from assay_features.events import Events
from assay_features.row_features import model_columns
from assay_platform.models.encoding import EncodedRows
from assay_platform.models.fraud import FraudModel
from assay_platform.models.trees import TreeEnsemble
from assay_platform.robustness.attacks import (
    DescentConfig,
    EvolutionConfig,
    Slopes,
    descend,
    evolve,
    swap_with_donors,
)
from assay_platform.robustness.constraints import Constraints, FeasibleSet, Transactions
from assay_platform.robustness.counterfactual import Choices
from numpy.typing import NDArray

from assay_pipelines.fraud.evaluate import auc
from assay_pipelines.fraud.train import Copies

if TYPE_CHECKING:
    from assay_pipelines.fraud.prepare import Prepared

Rows = NDArray[np.intp]
_NUM_COPIES, _MAX_DONORS = 16, 20_000
# What training can afford for every fraud, and a gate for some; benchmarks search longer.
_TRAINING_ATTACK = EvolutionConfig(num_generations=4, population=8)
GATE_ATTACK = EvolutionConfig(num_generations=10, population=12)
_MAX_ATTACKED = 300


class Robustness(NamedTuple):
    """What a search for feasible forms does to frauds: before and after, at the model's own threshold."""

    recall: float
    robust_recall: float
    robust_auc: float
    num_attacked: int


class Adversary:
    """Knows what the senders of a table's events can change, and what the model would see then."""

    def __init__(self, prepared: "Prepared") -> None:
        self._prepared = prepared
        schema = prepared.schema
        self._numeric, self._keys = schema.numeric, schema.keys
        self.feasible = FeasibleSet.fit(schema.limits, self._numeric, self._keys, written(prepared, prepared.train))
        movable = {n for n, m in zip(self._numeric, self.feasible.movable_F, strict=True) if m}
        movable |= {n for n, m in zip(self._keys, self.feasible.movable_C, strict=True) if m}
        # Only of an entity that can be posed as are there other features than the row's own.
        self._histories = []
        for plan, source in prepared.sources():
            posed = [d for e in plan.entities if movable.intersection(entity_columns(e)) for d in plan.of_entity(e)]
            self._histories.append(History(FeaturePlan(tuple(posed)), source))

    def transactions(self, rows: Rows) -> Transactions:
        """Events of the table as their senders wrote them."""
        return written(self._prepared, rows)

    def encode(self, rows: Rows, forms: Transactions) -> EncodedRows:
        """What the model sees of events of the table in another form. rows (M,), forms (M,)."""
        prepared = self._prepared
        events = Events(
            prepared.events.time_us[rows],
            # Nobody sends what an account is known by, so it stays the same.
            {name: prepared.events.keys[name][rows] for name in prepared.schema.worked_out}
            | {name: forms.keys[:, c] for c, name in enumerate(self._keys)},
            {name: forms.numbers[:, f] for f, name in enumerate(self._numeric)},
        )
        history = {name: np.asarray(prepared.columns[name])[rows] for name in prepared.plan.numeric_names}
        for held in self._histories:
            history |= held.at(events)
        return prepared.data.encoder.apply(model_columns(prepared.plan, events, history, prepared.tables))

    def copies(self, rows: Rows, generator: np.random.Generator) -> Copies:
        """Forms of the frauds among `rows`, which are training rows, in the clothes of honest ones."""
        labels = self._prepared.labels[rows]
        frauds, donors = rows[labels], self._donors(rows[~labels], generator)
        parts = []
        for _ in range(_NUM_COPIES):
            own, share = self.transactions(frauds), float(generator.choice([0.3, 0.6, 1.0]))
            parts.append(self.encode(frauds, swap_with_donors(own, donors, self.feasible, generator, share=share)))
        of = torch.full((len(rows),), -1, dtype=torch.int64)
        of[torch.from_numpy(np.flatnonzero(labels))] = torch.arange(len(frauds))
        return Copies(
            EncodedRows(torch.stack([p.values_NF for p in parts], 1), torch.stack([p.codes_NC for p in parts], 1)), of
        )

    def worst_forms(self, trees: TreeEnsemble, rows: Rows, generator: np.random.Generator) -> EncodedRows:
        """Of each fraud among `rows`, training rows, the form that a short search finds these trees to mind least."""
        labels = self._prepared.labels[rows]
        frauds = rows[labels]
        found = evolve(
            lambda which, forms: trees.logits(self.encode(frauds[which], forms).numbers()),
            self.transactions(frauds),
            self._donors(rows[~labels], generator),
            self.feasible,
            generator,
            _TRAINING_ATTACK,
        )
        return self.encode(frauds, found.transactions)

    def attack(
        self,
        model: FraudModel,
        rows: Rows,
        generator: np.random.Generator,
        config: EvolutionConfig | DescentConfig = GATE_ATTACK,
        max_attacked: int = _MAX_ATTACKED,
    ) -> Robustness:
        """Search for the worst forms of the frauds among `rows`, a sample of them, against the whole model; with a
        `DescentConfig` along the slopes of its net.
        """
        labels = self._prepared.labels[rows]
        frauds, honest = rows[labels], rows[~labels]
        if len(frauds) > max_attacked:
            frauds = np.sort(generator.choice(frauds, max_attacked, replace=False))
        own = self.transactions(frauds)
        donors = self._donors(self._prepared.train[~self._prepared.labels[self._prepared.train]], generator)

        def score(which: Rows, forms: Transactions) -> NDArray[np.float64]:
            return model.logits(self.encode(frauds[which], forms))

        def slope(which: Rows, forms: Transactions) -> Slopes:
            return self._slopes(model, self.encode(frauds[which], forms))

        if isinstance(config, DescentConfig):
            found = descend(score, slope, own, donors, self.feasible, generator, config)
        else:
            found = evolve(score, own, donors, self.feasible, generator, config)
        return self.judged(model, frauds, honest, found.logits)

    def judged(self, model: FraudModel, frauds: Rows, honest: Rows, attacked: NDArray[np.float64]) -> Robustness:
        """What attacked logits of frauds come to beside the honest rows as they are."""
        calibration, threshold = model.calibration, model.policy.decline_from
        encoded = self._prepared.rows.rows
        before = calibration.probability(model.logits(encoded.rows(torch.from_numpy(frauds))))
        after = calibration.probability(attacked)
        good = calibration.probability(model.logits(encoded.rows(torch.from_numpy(honest))))
        return Robustness(
            recall=float((before >= threshold).mean()),
            robust_recall=float((after >= threshold).mean()),
            robust_auc=auc(np.r_[np.ones(len(after), dtype=bool), np.zeros(len(good), dtype=bool)], np.r_[after, good]),
            num_attacked=len(frauds),
        )

    def _slopes(self, model: FraudModel, encoded: EncodedRows) -> Slopes:
        """The net's slopes by the columns of transactions; what is not known to move it directly is 0."""
        encoder, slopes = model.parts.encoder, model.net_slopes(encoded)
        num_rows = len(encoded.values_NF)
        numbers = np.column_stack(
            [np.empty((num_rows, 0)), *(slopes.numbers[:, encoder.numeric.index(name)] for name in self._numeric)]
        )
        values = []
        for name, allowed in zip(self._keys, self.feasible.allowed, strict=True):
            column = encoder.categorical.index(name) if name in encoder.categorical else -1
            if column in slopes.codes:
                code_of = {word: i + 1 for i, word in enumerate(encoder.vocabularies[column])}
                values.append(slopes.codes[column][:, [code_of.get(value, 0) for value in allowed]])
            else:
                values.append(np.zeros((num_rows, len(allowed))))
        return Slopes(numbers, tuple(values))

    def _donors(self, honest: Rows, generator: np.random.Generator) -> Transactions:
        picked = generator.choice(honest, min(len(honest), _MAX_DONORS), replace=False)
        return self.transactions(picked)


def is_declared(constraints: Constraints) -> bool:
    """Whether a schema says more of its senders than what they cannot change at all."""
    return constraints != Constraints()


def written(prepared: "Prepared", rows: Rows) -> Transactions:
    """Events of a table as their senders wrote them."""
    events, schema = prepared.events, prepared.schema
    numbers = np.column_stack([np.empty((len(rows), 0)), *(events.numbers[n][rows] for n in schema.numeric)])
    keys = np.empty((len(rows), len(schema.keys)), dtype=object)
    for c, name in enumerate(schema.keys):
        keys[:, c] = events.keys[name][rows]
    return Transactions(numbers, keys)


def possible_choices(prepared: "Prepared") -> Choices:
    """What a counterfactual may try, from the legitimate training events."""
    schema = prepared.schema
    legitimate = written(prepared, prepared.train[~prepared.labels[prepared.train]])
    return Choices.fit(FeasibleSet.fit(schema.limits, schema.numeric, schema.keys, legitimate), legitimate)
