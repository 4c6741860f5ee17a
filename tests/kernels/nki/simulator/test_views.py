"""Views of tensors agree with the same views of NumPy arrays."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from nki_simulated import body, breaks, nisa, nl, normal, run, sbuf

from vllm_neuron_rmsq.kernels.nki.simulator import simulate


def through_view(x, change, shape):
    out = nl.ndarray(shape, dtype=x.dtype, buffer=nl.shared_hbm)
    nisa.dma_copy(dst=out, src=change(x))
    tile = nl.load(x)
    nisa.dma_copy(dst=out, src=change(tile))
    return out


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_chains_of_views_agree_with_numpy(data):
    array = np.arange(8 * 6 * 4 * 5, dtype=np.int32).reshape(8, 6, 4, 5)
    steps, want = [], array
    for _ in range(data.draw(st.integers(1, 5))):
        kind = data.draw(st.sampled_from(["slice", "permute", "flatten", "split", "expand", "index"]))
        dim = data.draw(st.integers(0 if kind == "slice" else 1, max(want.ndim - 1, 1)))
        if kind == "slice":
            start = data.draw(st.integers(0, want.shape[dim] - 1))
            stop = data.draw(st.integers(start + 1, want.shape[dim]))
            step = data.draw(st.integers(1, 3))
            key = (slice(None),) * dim + (slice(start, stop, step if dim else 1),)
            steps.append(lambda t, key=key: t[key])
            want = want[key]
        elif kind == "permute":
            order = (0, *data.draw(st.permutations(range(1, want.ndim))))
            steps.append(lambda t, order=order: t.permute(order))
            want = want.transpose(order)
        elif kind == "flatten" and want.flags.c_contiguous and want.ndim > 2:
            steps.append(lambda t: t.flatten_dims(1, t.ndim - 1))
            want = want.reshape(want.shape[0], -1)
        elif kind == "split" and want.ndim < 5 and want.shape[dim] % 2 == 0:
            steps.append(lambda t, dim=dim: t.reshape_dim(dim, (2, -1)))
            want = want.reshape(*want.shape[:dim], 2, want.shape[dim] // 2, *want.shape[dim + 1 :])
        elif kind == "expand" and want.ndim < 5:
            steps.append(lambda t, dim=dim: t.expand_dim(dim))
            want = np.expand_dims(want, dim)
        elif kind == "index" and want.ndim > 2:
            index = data.draw(st.integers(-want.shape[dim], want.shape[dim] - 1))
            steps.append(lambda t, key=(slice(None),) * dim + (index,): t[key])
            want = want[(slice(None),) * dim + (index,)]

    def change(tensor):
        for step in steps:
            tensor = step(tensor)
        assert tensor.shape == want.shape
        return tensor

    np.testing.assert_array_equal(simulate(through_view)(array, change, want.shape), want)


def test_view_attributes_are_those_of_the_language_guide():
    def statements():
        t = nl.ndarray((128, 64), dtype=nl.float32, buffer=nl.sbuf)
        assert (t.shape, t.strides, t.offset, t.ndim, t.size) == ((128, 64), (64, 1), 0, 2, 8192)
        assert t.dtype == nl.float32 and t.buffer == nl.sbuf and t.is_contiguous()
        u = t.slice(dim=1, start=8, end=24)
        assert u.get_pattern() == [[64, 128], [1, 16]] and u.offset == 8
        assert t.view(nl.uint8).shape == (128, 256) and t.view(nl.uint8).view(nl.bfloat16).shape == (128, 128)
        c = nl.ndarray((64, 64, 64), dtype=nl.float32, buffer=nl.sbuf)
        assert c[0, 0, 10].shape == (1, 1) and c[:, 0, 10].shape == (64, 1) and c[0].shape == (1, 64, 64)
        assert c[..., ::2].shape == (64, 64, 32) and c[:, nl.ds(3, 5)].shape == (64, 5, 64)
        h = nl.ndarray((4, 128, 32), dtype=nl.float32, buffer=nl.shared_hbm)
        assert h[0].shape == (128, 32) and h[-1, 5].shape == (32,)
        r = t.rearrange(("b", ("h", "w")), ("b", "w", "h"), {"h": 4})
        assert r.shape == (128, 16, 4) and r.strides == (64, 1, 16) and not r.is_contiguous()
        assert c.permute((0, 2, 1)).broadcast is not None and t.expand_dim(1).broadcast(1, 8).shape == (
            128,
            8,
            64,
        )
        assert t.ap([[64, 128], [2, 32]], offset=1).shape == (128, 32) and t.address is None

    body(statements)


def test_ap_reinterprets_and_a_register_selects():
    x = normal(4, 128, 8)

    def kernel(x, index):
        out = nl.ndarray((3, 128, 8), dtype=x.dtype, buffer=nl.shared_hbm)
        at = nl.load(index)
        nisa.dma_copy(dst=out[0], src=x.select(0, at))
        register = nisa.register_alloc()
        nisa.register_load(register, at)
        nisa.dma_copy(dst=out[1], src=x.ap([[8, 128], [1, 8]], scalar_offset=register, indirect_dim=0))
        for i in nl.dynamic_range(register, 4):
            nisa.dma_copy(dst=out[2], src=x[i])
        return out

    got = simulate(kernel)(x, np.array([[3]], np.int32))
    np.testing.assert_array_equal(got, np.stack([x[3]] * 3))

    def halves(d, a):
        return nisa.tensor_copy(d, a.ap([[16, 128], [2, 8]], offset=1, dtype=nl.bfloat16))

    got = run(halves, (128, 8), nl.bfloat16, x[0])
    np.testing.assert_array_equal(got.view(np.uint16), (x[0].view(np.uint32) >> 16).astype(np.uint16))


def test_a_placed_tensor_shares_bytes_with_one_placed_over_it():
    def statements():
        a = sbuf((128, 64), address=(0, 1024), value=3)
        assert a.address == (0, 1024)
        b = sbuf((32, 16), address=(96, 1024 + 128), value=5)
        assert (b.read("test", "b") == 5).all()
        assert (a[:, 0:32].read("test", "a") == 3).all() and (a[0:64].read("test", "a") == 3).all()
        nisa.tensor_copy(sbuf((128, 64)), a)

    breaks(r"tensor_copy: src: .* bytes that float32\[32, 16\], placed over it, wrote", statements)
