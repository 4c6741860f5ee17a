"""Replaces ``forward`` by one with keyword arguments for asynchronous speculative decoding."""

import functools


def async_speculative_decoding(cls):
    plain = cls.forward

    @functools.wraps(plain)
    def forward(
        self,
        *args,
        positions,
        attn_metadata,
        spec_decode_metadata=None,
        prev_sampled_token_ids=None,
        **kwargs,
    ):
        assert prev_sampled_token_ids is None, "asynchronous speculation is not in this stand-in"
        return plain(
            self,
            *args,
            positions=positions,
            attn_metadata=attn_metadata,
            spec_decode_metadata=spec_decode_metadata,
            **kwargs,
        )

    cls.forward = forward
    return cls
