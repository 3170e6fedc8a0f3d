import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gristmill.corpus.loader import ExampleLoader, PackedLoader
from gristmill.corpus.shards import TokenDataset, TokenList, write_shards
from gristmill.errors import DataError
from gristmill.tokens.batch import IGNORED


def numbered_documents(lengths):
    """Documents whose every token is unique, so that a batch tells where its tokens came from."""
    starts = np.cumsum([0, *lengths])
    return [(list(range(start, start + length)), None) for start, length in zip(starts, lengths, strict=False)]


def source(lengths):
    return TokenList(numbered_documents(lengths), vocab_size=sum(lengths))


def same(left, right):
    return (
        torch.equal(left.input_ids, right.input_ids)
        and torch.equal(left.target_ids, right.target_ids)
        and left.segment_lengths == right.segment_lengths
    )


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=50),
    row_length=st.integers(1, 32),
    rows_per_batch=st.integers(1, 7),
    epoch=st.integers(0, 2),
)
def test_every_token_comes_once_an_epoch(lengths, row_length, rows_per_batch, epoch):
    loader = PackedLoader(source(lengths), row_length=row_length, rows_per_batch=rows_per_batch, seed=3)
    steps = range(epoch * loader.batches_per_epoch, (epoch + 1) * loader.batches_per_epoch)
    sizes = [len(loader.rows(step)) for step in steps]
    assert max(sizes) <= rows_per_batch
    assert max(sizes) - min(sizes) <= 1
    ids = torch.cat([loader.batch(step).input_ids for step in steps])
    assert sorted(ids.tolist()) == list(range(sum(lengths)))


def test_segments_are_pieces_of_one_document_in_order():
    lengths = [7, 30, 12, 5, 9]
    loader = PackedLoader(source(lengths), row_length=16, rows_per_batch=2, seed=0)
    ends = np.cumsum(lengths)
    for step in range(loader.batches_per_epoch):
        batch = loader.batch(step)
        for ids in batch.input_ids.split(list(batch.segment_lengths)):
            first, last = int(ids[0]), int(ids[-1])
            assert ids.tolist() == list(range(first, last + 1))
            assert np.searchsorted(ends, first, "right") == np.searchsorted(ends, last, "right")


def test_a_resumed_loader_goes_on_where_it_stood():
    lengths = np.random.default_rng(0).integers(1, 50, 300).tolist()
    arguments = {"row_length": 64, "rows_per_batch": 4, "seed": 11}
    running = PackedLoader(source(lengths), **arguments)
    expected = [running.batch(step) for step in range(3 * running.batches_per_epoch)]
    for step in (2 * running.batches_per_epoch + 1, 5, 0, running.batches_per_epoch):
        assert same(PackedLoader(source(lengths), **arguments).batch(step), expected[step])
        assert same(running.batch(step), expected[step])


def test_epochs_and_seeds_differ_unless_told_not_to():
    lengths = [10] * 200
    loader = PackedLoader(source(lengths), row_length=20, rows_per_batch=4, seed=0)
    assert not same(loader.batch(0), loader.batch(loader.batches_per_epoch))
    other = PackedLoader(source(lengths), row_length=20, rows_per_batch=4, seed=1)
    assert not same(loader.batch(0), other.batch(0))
    fixed = PackedLoader(source(lengths), row_length=20, rows_per_batch=4, seed=0, shuffle=False)
    assert same(fixed.batch(1), fixed.batch(1 + fixed.batches_per_epoch))


def test_disk_and_memory_give_the_same_batches_with_masks(tmp_path):
    generator = np.random.default_rng(5)
    documents = []
    for length in generator.integers(2, 40, 60):
        mask = generator.integers(0, 2, length)
        mask[-1] = 1
        documents.append((generator.integers(1, 50, length), mask))
    write_shards(documents, tmp_path / "s", vocab_size=50, tokenizer_hash="h", eos_token_id=None, shard_tokens=200)
    arguments = {"row_length": 48, "rows_per_batch": 3, "seed": 2}
    disk = PackedLoader(TokenDataset.open(tmp_path / "s"), **arguments)
    memory = PackedLoader(TokenList(documents, vocab_size=50), **arguments)
    assert all(same(disk.batch(step), memory.batch(step)) for step in range(disk.batches_per_epoch))
    learned = sum(disk.batch(step).target_count for step in range(disk.batches_per_epoch))
    assert learned == sum(int(mask[1:].sum()) for _, mask in documents)
    assert int((disk.batch(0).target_ids == IGNORED).sum()) > 0


def test_refusals():
    with pytest.raises(DataError, match="longer than a row"):
        PackedLoader(source([9]), row_length=8, rows_per_batch=1, seed=0, long_documents="refuse")
    loader = PackedLoader(source([9]), row_length=8, rows_per_batch=1, seed=0)
    with pytest.raises(ValueError, match="number of a batch must be 0 or more"):
        loader.batch(-1)
    with pytest.raises(ValueError, match="rows_per_batch"):
        PackedLoader(source([9]), row_length=8, rows_per_batch=0, seed=0)
    assert loader.utilisation == 9 / 16


def test_prepare_gets_each_piece_with_a_key_that_packing_does_not_change():
    lengths = [7, 30, 12, 5, 9]
    seen = {}
    for rows_per_batch in (1, 3):
        pairs = {}

        def prepare(segments, keys, pairs=pairs):
            pairs.update(zip(keys, (ids.tolist() for ids, _ in segments), strict=True))
            return len(segments)

        arguments = {"row_length": 16, "rows_per_batch": rows_per_batch, "seed": 4, "prepare": prepare}
        loader = PackedLoader(source(lengths), **arguments)
        counts = [loader.batch(number) for number in range(2 * loader.batches_per_epoch)]
        assert sum(counts) == len(pairs) == 2 * len(loader.packing.pieces)  # no key twice, in no epoch
        seen[rows_per_batch] = pairs
    assert seen[1] == seen[3]
    begins = np.cumsum([0, *lengths])
    for (seed, epoch, document, start), ids in seen[1].items():
        assert seed == 4
        assert epoch in (0, 1)
        assert ids[0] == begins[document] + start


def test_far_batches_are_found_without_a_walk():
    class Counting(TokenList):
        reads = 0

        def read(self, pieces):
            self.reads += len(pieces)
            return super().read(pieces)

    counting = Counting(numbered_documents([10] * 60), vocab_size=600)
    loader = PackedLoader(counting, row_length=20, rows_per_batch=3, seed=0)
    far = loader.batch(10**6)
    assert counting.reads == 6
    assert same(PackedLoader(source([10] * 60), row_length=20, rows_per_batch=3, seed=0).batch(10**6), far)


@settings(max_examples=30, deadline=None)
@given(count=st.integers(1, 40), per_batch=st.integers(1, 9), epoch=st.integers(0, 3), shuffle=st.booleans())
def test_every_example_comes_once_an_epoch_with_its_key(count, per_batch, epoch, shuffle):
    arguments = {"examples_per_batch": per_batch, "seed": 6, "shuffle": shuffle}
    examples = [f"example {number}" for number in range(count)]
    loader = ExampleLoader(examples, prepare=lambda chosen, keys: list(zip(chosen, keys, strict=True)), **arguments)
    numbers = range(epoch * loader.batches_per_epoch, (epoch + 1) * loader.batches_per_epoch)
    batches = [loader.batch(number) for number in numbers]
    sizes = [len(batch) for batch in batches]
    assert max(sizes) <= per_batch
    assert max(sizes) - min(sizes) <= 1
    flat = [pair for batch in batches for pair in batch]
    assert sorted(flat) == sorted((examples[index], (6, epoch, index)) for index in range(count))
    assert shuffle or [key[2] for _, key in flat] == list(range(count))
    assert loader.batch(numbers[-1]) == batches[-1]


def test_examples_are_shuffled_anew_each_epoch():
    loader = ExampleLoader(range(50), examples_per_batch=50, seed=0, prepare=lambda chosen, keys: chosen)
    first, second = loader.batch(0), loader.batch(1)
    assert first != second != sorted(second)


def test_no_examples_are_refused():
    with pytest.raises(DataError, match="there are no examples"):
        ExampleLoader([], examples_per_batch=1, seed=0, prepare=lambda chosen, keys: chosen)
    with pytest.raises(ValueError, match="examples_per_batch"):
        ExampleLoader([1], examples_per_batch=0, seed=0, prepare=lambda chosen, keys: chosen)
