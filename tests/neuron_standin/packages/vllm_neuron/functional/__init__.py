"""What AWS's kernels compute, in plain PyTorch: the fallbacks of CPU mode.

Dimensions:
    B: sequences  S: new tokens of each  T: tokens  H: hidden size  Dh: head size  Nh: heads  C: context
    length
"""

from __future__ import annotations

import torch
from torch.nn import functional as F

from vllm_neuron.utils.dtype_utils import is_fp8


def _turn(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate halves; cos and sin hold half a head."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def qkv_proj(
    hidden,
    qkv_weights,
    norm_weights=None,
    d_head=None,
    bias=None,
    cos_cache=None,
    sin_cache=None,
    num_q_heads=None,
    num_kv_heads=None,
    k_cache=None,
    v_cache=None,
    use_block_kv=False,
    block_size=None,
    slot_mapping=None,
):
    """``[1, T, H]`` -> ``[1, T, q + 2 kv]`` with RoPE; with caches also writes them and returns
    ``(q, k_cache, v_cache)``. bias is ``[1, q + 2 kv]``, cos_cache and sin_cache are ``[1, T, Dh]``."""
    assert norm_weights is None
    assert hidden.dim() == 3 and qkv_weights.shape[0] == hidden.shape[-1]
    assert bias is None or bias.shape == (1, qkv_weights.shape[1])
    out = hidden @ qkv_weights
    if bias is not None:
        out = out + bias
    heads = out.view(*out.shape[:2], -1, d_head)
    half = d_head // 2
    turned = _turn(
        heads[:, :, : num_q_heads + num_kv_heads], cos_cache[:, :, None, :half], sin_cache[:, :, None, :half]
    )
    heads = torch.cat([turned, heads[:, :, num_q_heads + num_kv_heads :]], dim=2)
    if k_cache is None and v_cache is None:
        return heads.flatten(2)
    assert k_cache is not None and v_cache is not None and use_block_kv
    assert slot_mapping is not None and block_size is not None
    slots = slot_mapping.reshape(-1).long()
    k, v = heads[0, :, num_q_heads:].split(num_kv_heads, dim=1)
    k_cache[slots // block_size, :, slots % block_size] = k.to(k_cache.dtype)
    v_cache[slots // block_size, :, slots % block_size] = v.to(v_cache.dtype)
    return heads[:, :, :num_q_heads].flatten(2), k_cache, v_cache


def flash_attention(q, k, v, scale=None, causal_mask=True, tp_q=True, tp_k=False, tp_out=False):
    """Causal: q ``[Nh, T, Dh]`` (tp_q) or ``[Nh, Dh, T]``, k likewise, v ``[Nh, T, Dh]``."""
    assert causal_mask and q.dim() == k.dim() == v.dim() == 3
    q = q if tp_q else q.transpose(1, 2)
    k = k if tp_k else k.transpose(1, 2)
    scores = (q @ k.transpose(1, 2)) * scale
    later = torch.ones(q.shape[1], k.shape[1], dtype=torch.bool, device=q.device).triu(1)
    weights = torch.softmax(scores.float().masked_fill(later, float("-inf")), dim=-1).to(q.dtype)
    out = weights @ v
    return out.transpose(1, 2) if tp_out else out


def segmented_attention(
    q,
    k_cache,
    v_cache,
    block_tables,
    prior_tokens,
    block_size,
    kv_segment_size,
    scale,
    tp_q=True,
    tp_out=False,
    fp8_packed=False,
):
    """Causal over the paged cache, which holds the new tokens already: q ``[Nh, T, Dh]``."""
    assert tp_q and not fp8_packed and not is_fp8(k_cache.dtype)
    assert kv_segment_size % block_size == 0
    heads, rows, _ = q.shape
    blocks = block_tables[0].clamp(min=0).long()
    k, v = (
        cache[blocks].transpose(0, 1).flatten(1, 2).repeat_interleave(heads // cache.shape[1], dim=0).float()
        for cache in (k_cache, v_cache)
    )
    prior = prior_tokens.reshape(-1)[0]
    position = prior + torch.arange(rows, device=q.device)[:, None]
    allowed = torch.arange(k.shape[1], device=q.device)[None] <= position
    scores = (q.float() @ k.transpose(1, 2)) * scale
    out = (torch.softmax(scores.masked_fill(~allowed, float("-inf")), dim=-1) @ v).to(q.dtype)
    return out.transpose(1, 2) if tp_out else out


def gen_attention_decode_mask(
    pos_ids,
    bs,
    q_head,
    s_active,
    s_prior,
    start_pos=None,
    block_len=0,
    local_filled_slots=None,
    dcp_active_mask=None,
):
    """``[C, B, Nh, S]``: what is cached before a sequence's first new token, and the new ones causally, which
    take the last S places."""
    assert start_pos is None and local_filled_slots is None and dcp_active_mask is None
    if s_prior % 128:
        raise ValueError(f"s_prior ({s_prior}) must be divisible by 128")
    assert pos_ids.shape == (1, bs * s_active) and pos_ids.dtype == torch.float32
    place = torch.arange(s_prior, device=pos_ids.device, dtype=torch.float32)
    prior = place[:, None] < pos_ids.view(bs, s_active).amin(1)[None]
    mask = prior[:, :, None, None].expand(s_prior, bs, q_head, s_active).float()
    new = torch.ones(s_active, s_active, device=pos_ids.device).triu()
    return torch.cat([mask[: s_prior - s_active], new[:, None, None].expand(s_active, bs, q_head, s_active)])


def attention_decode(
    X,
    X_hidden_dim_actual=None,
    rmsnorm_X_enabled=False,
    rmsnorm_X_eps=None,
    rmsnorm_X_gamma=None,
    W_qkv=None,
    bias_qkv=None,
    rmsnorm_QK_pre_rope_enabled=False,
    cos=None,
    sin=None,
    rope_contiguous_layout=True,
    rmsnorm_QK_post_rope_enabled=False,
    K_cache_transposed=False,
    active_blocks_table=None,
    K_cache=None,
    V_cache=None,
    attention_mask=None,
    sink=None,
    softmax_scale=None,
    update_cache=False,
    kv_cache_update_idx=None,
    k_scale=None,
    v_scale=None,
    fp8_packed=False,
    W_out=None,
    bias_out=None,
    transposed_out=False,
    out_in_sb=False,
    attention_dp=1,
    attention_dp_group=None,
    attention_dp_rank=0,
    kv_needs_a2a=False,
    dcp_size=1,
    dcp_group=None,
):
    """Decode's megakernel: norm, QKV, RoPE, cache update, attention, output projection.

    ``X [B, S, H]``, ``W_qkv [H, q + 2 kv]``, ``bias_qkv [1, q + 2 kv]``, cos and sin ``[Dh / 2, B, S]``,
    caches ``[blocks, kv heads, block, Dh]``, ``active_blocks_table [B, blocks]`` int32. Returns ``[B S, H]``,
    or ``[B, q heads, Dh, S]`` without ``W_out``.
    """
    assert update_cache and rope_contiguous_layout and not K_cache_transposed and not transposed_out
    assert not (
        rmsnorm_QK_pre_rope_enabled or rmsnorm_QK_post_rope_enabled or sink or fp8_packed or out_in_sb
    )
    assert attention_dp == dcp_size == 1 and not kv_needs_a2a
    assert active_blocks_table.dtype == torch.int32, "active_blocks_table must be int32 with -1 padding"
    assert kv_cache_update_idx.dtype == torch.uint32
    assert V_cache.dim() == 4
    batch, rows, _ = X.shape
    _, kv_heads, block, head = V_cache.shape
    assert cos.shape == sin.shape == (head // 2, batch, rows) and cos.is_contiguous()
    assert bias_qkv is None or bias_qkv.shape == (1, W_qkv.shape[1])
    x = X
    if rmsnorm_X_enabled:
        assert rmsnorm_X_gamma.shape == (1, X.shape[-1]) and rmsnorm_X_eps is not None
        x = x.float()
        x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + rmsnorm_X_eps)
        x = (x * rmsnorm_X_gamma.float()).to(X.dtype)
    qkv = x @ W_qkv
    if bias_qkv is not None:
        qkv = qkv + bias_qkv
    heads = qkv.view(batch, rows, -1, head).transpose(1, 2)
    q_heads = heads.shape[1] - 2 * kv_heads
    assert q_heads > 0 and q_heads % kv_heads == 0, "GQA requires q_heads divisible by kv_heads"
    v = heads[:, q_heads + kv_heads :]
    turned = _turn(heads[:, : q_heads + kv_heads], *(t.permute(1, 2, 0)[:, None] for t in (cos, sin)))
    q, k = turned.split([q_heads, kv_heads], dim=1)
    if k_scale is not None:
        assert is_fp8(K_cache.dtype)
        k, v = ((t * s).clamp(-240, 240).to(K_cache.dtype) for t, s in ((k, k_scale), (v, v_scale)))
    else:
        assert not is_fp8(K_cache.dtype)
    context = active_blocks_table.shape[1] * block
    assert attention_mask.shape == (context, batch, q_heads, rows)
    table = active_blocks_table.clamp(min=0).long()

    def seen(cache, new):
        old = cache.to(X.dtype)[table].permute(0, 2, 1, 3, 4).reshape(batch, kv_heads, context, head)
        both = torch.cat([old[:, :, : context - rows], new.to(X.dtype)], dim=2)
        return both.repeat_interleave(q_heads // kv_heads, dim=1)

    scores = (q @ seen(K_cache, k).transpose(2, 3)) * softmax_scale
    hidden = attention_mask.permute(1, 2, 3, 0) == 0
    weights = torch.softmax(scores.float().masked_fill(hidden, float("-inf")), dim=-1).to(q.dtype)
    out = weights @ seen(V_cache, v)
    slots = kv_cache_update_idx.to(torch.int64).reshape(-1)
    last = V_cache.shape[0] * block - 1
    slots = torch.where(slots > last, torch.full_like(slots, last), slots)
    for cache, new in ((K_cache, k), (V_cache, v)):
        flat = new.transpose(1, 2).reshape(-1, kv_heads, head).to(cache.dtype)
        if is_fp8(cache.dtype):
            cache.view(torch.uint8)[slots // block, :, slots % block] = flat.view(torch.uint8)
        else:
            cache[slots // block, :, slots % block] = flat
    if W_out is None:
        assert bias_out is None
        return out.transpose(2, 3).contiguous()
    flat = out.transpose(1, 2).reshape(batch * rows, -1) @ W_out
    assert bias_out is None or bias_out.shape == (1, W_out.shape[1])
    return flat if bias_out is None else flat + bias_out


def o_proj(active, weight, bias=None):
    """``[1, Nh, Dh, T] @ [Nh Dh, H]`` -> ``[1, T, H]``."""
    out = active.flatten(1, 2).transpose(1, 2) @ weight
    assert bias is None or bias.shape == (1, weight.shape[1])
    return out if bias is None else out + bias


def mlp(hidden, gate, up, down):
    """``[T, H]`` -> ``[T, H]``."""
    return (F.silu(hidden @ gate) * (hidden @ up)) @ down


def merge_prompt_embeds(hidden, inputs_embeds, is_token_ids):
    assert inputs_embeds is None and is_token_ids is None
    return hidden
