import pytest

from rlhf_fast.data import batch_indices, epoch_order


def test_every_epoch_is_another_permutation_of_all_rows():
    orders = [epoch_order(50, seed=3, epoch=epoch) for epoch in range(4)]
    assert all(sorted(order) == list(range(50)) for order in orders)
    assert len({tuple(order) for order in orders}) == 4


def test_order_depends_on_seed_and_epoch_alone():
    assert epoch_order(50, 3, 1) == epoch_order(50, 3, 1)
    assert epoch_order(50, 3, 1) != epoch_order(50, 4, 1)
    assert epoch_order(50, 0, 1) != epoch_order(50, 1, 0), "seed and epoch must not add up to the same stream"


@pytest.mark.parametrize(("count", "batch_size"), [(7, 3), (8, 4), (5, 1), (1, 4), (3, 10)])
def test_steps_cover_each_row_once_an_epoch_and_run_over(count: int, batch_size: int):
    batches = [batch_indices(count, batch_size, step, seed=9) for step in range(count * 2)]
    assert all(len(batch) == batch_size for batch in batches)
    stream = [index for batch in batches for index in batch]
    for epoch in range(len(stream) // count):
        assert stream[epoch * count : (epoch + 1) * count] == epoch_order(count, 9, epoch)


def test_a_step_is_found_without_the_steps_before_it():
    assert batch_indices(7, 3, 1000, seed=0) == batch_indices(7, 3, 1000, seed=0)
    assert batch_indices(7, 7, 1000, seed=0) == epoch_order(7, 0, 1000)


@pytest.mark.parametrize(("count", "batch_size", "step"), [(0, 1, 0), (1, 0, 0), (1, 1, -1)])
def test_senseless_arguments_are_refused(count: int, batch_size: int, step: int):
    with pytest.raises(ValueError, match="expected count >= 1"):
        batch_indices(count, batch_size, step, seed=0)
    with pytest.raises(ValueError, match="count must be at least 1"):
        epoch_order(0, 0, 0)
