"""Pieces of tensors: their names, and what is put together from them."""

import pytest
import torch

from v4train.parallel.slices import Slice, assembled


def cut(name, whole, blocks, ranges):
    """Pieces of a tensor [A, B]: blocks of columns, each in so many flat ranges."""
    width, pieces = whole.shape[1] // blocks, []
    for number in range(blocks):
        columns = slice(number * width, (number + 1) * width)
        flat = whole[:, columns].flatten()
        for part in torch.arange(len(flat)).tensor_split(ranges):
            piece = Slice(name, (slice(0, len(whole)), columns), int(part[0]))
            pieces.append((piece, flat[part]))
    return pieces


def test_keys_are_read_back():
    for piece in (Slice("blocks.0.x", (slice(4, 8), slice(0, 64)), 512), Slice("scalar", (), 0)):
        assert Slice.of_key(piece.key()) == piece
    assert Slice("a.b", (slice(4, 8), slice(0, 64)), 512).key() == "a.b[4:8,0:64]+512"
    assert Slice.of_key("blocks.0.attention.sink") is None


@pytest.mark.parametrize("blocks", [1, 2, 6])
@pytest.mark.parametrize("ranges", [1, 3])
def test_any_box_is_put_together_from_any_pieces(blocks, ranges):
    whole = torch.randn(5, 12)
    pieces = cut("x", whole, blocks, ranges)[::-1]  # in any order
    assert torch.equal(assembled(pieces), whole)
    for box in ((slice(0, 5), slice(0, 12)), (slice(1, 3), slice(3, 9)), (slice(4, 5), slice(11, 12))):
        assert torch.equal(assembled(pieces, box), whole[box])


def test_blocks_outside_the_box_are_not_looked_at():
    pieces = cut("x", torch.randn(4, 8), 2, 1)
    pieces[1] = (pieces[1][0], None)
    box = (slice(0, 4), slice(1, 4))
    with pytest.raises(AttributeError):
        assembled(pieces)
    assert assembled(pieces, box).shape == (4, 3)


def test_what_is_missing_is_an_error():
    pieces = cut("x", torch.randn(4, 8), 2, 2)
    with pytest.raises(ValueError, match=r"^x: pieces of x\[0:4,0:4\]\+8 are missing"):
        assembled(pieces[1:])
    with pytest.raises(ValueError, match="^x: 16 of 32 values are missing"):
        assembled(pieces[2:], (slice(0, 4), slice(0, 8)))
