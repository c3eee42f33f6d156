"""The sequence encoder: what it looks at, and that it never looks ahead."""

import numpy as np
import torch
from assay_platform.models.histories import DAY_US, Histories
from assay_platform.models.sequence import SequenceConfig, SequenceEncoder, gap_buckets, latest, times_before

NUM_ITEMS, WIDTH, LENGTH = 12, 8, 5


def encoder() -> SequenceEncoder:
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    made = SequenceEncoder(rng.normal(size=(NUM_ITEMS, WIDTH)).astype("f4"), SequenceConfig(length=LENGTH)).eval()
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return made.requires_grad_(False)


def histories(lengths: list[int]) -> Histories:
    rng = np.random.default_rng(1)
    user = np.repeat(np.arange(len(lengths)), lengths)
    return Histories.of(
        user, rng.integers(0, NUM_ITEMS, len(user)), rng.integers(0, 9 * DAY_US, len(user)), num_users=len(lengths),
        now_us=10 * DAY_US,
    )  # fmt: skip


def test_it_looks_at_the_latest_events_and_at_the_mean_of_all_before() -> None:
    given, made = histories([3, 0, 9]), encoder()
    seen = latest(given, made.graph_ID, LENGTH)
    assert seen.length.tolist() == [3, 0, 5]
    assert seen.item[0, :3].tolist() == given.item[:3].tolist()
    assert seen.item[2].tolist() == given.item[7:].tolist()
    assert seen.gap[0, 0] == seen.gap.max(), "nothing before the first"
    torch.testing.assert_close(seen.before[2], made.graph_ID[torch.from_numpy(given.item[3:7])].mean(0))
    assert (seen.before[:2] == 0).all()


def test_a_user_alone_is_as_among_others() -> None:
    given, made = histories([3, 0, 9, 5]), encoder()
    together = made.users(given)
    assert together.shape == (4, WIDTH + 1)
    for user in range(4):
        np.testing.assert_allclose(made.users(given.part(user, user + 1))[0], together[user], rtol=1e-4, atol=1e-5)


def test_later_events_change_nothing_before_them() -> None:
    given, made = histories([LENGTH]), encoder()
    items = made.item_vectors()
    whole = latest(given, made.graph_ID, LENGTH)
    changed = whole._replace(item=torch.cat([whole.item[:, :3], (whole.item[:, 3:] + 1) % NUM_ITEMS], dim=1))
    torch.testing.assert_close(made(whole, items)[:, :4], made(changed, items)[:, :4])
    assert not torch.allclose(made(whole, items)[:, 4:], made(changed, items)[:, 4:])


def test_order_and_time_count() -> None:
    given, made = histories([LENGTH]), encoder()
    backwards = given._replace(item=given.item[::-1].copy())
    slower = given._replace(time_us=given.time_us * 9)
    for other in (backwards, slower):
        assert not np.allclose(made.users(given), made.users(other), atol=1e-3)


def test_gaps_and_repeats_are_counted() -> None:
    given = Histories.of(
        np.zeros(4, dtype=np.int64), np.array([2, 2, 3, 2]), np.array([0, 0, 30, 40 * 86_400]) * 1_000_000,
        num_users=1, now_us=90 * DAY_US,
    )  # fmt: skip
    buckets = gap_buckets(given.time_us, np.array([True, False, False, False]))
    assert buckets[1] == 0
    assert buckets[2] == 1
    assert buckets[3] == buckets[0] - 1, "the longest gap, before that of a first event"
    assert times_before(given, NUM_ITEMS).tolist() == [0, 1, 0, 2]


def test_new_items_have_a_score_of_their_own() -> None:
    made = encoder()
    longer = made.extended(2)
    given = histories([4])
    np.testing.assert_allclose(longer.users(given), made.users(given), rtol=1e-5)
    np.testing.assert_allclose(longer.stacked()[:NUM_ITEMS], made.stacked(), rtol=1e-6)
    assert longer.stacked().shape == (NUM_ITEMS + 2, WIDTH + 1)
