"""Standalone helpers for the golden data (numpy + Pillow only; no torch, no upstream code).

photo / doc / make_image   every test image from its spec (integer arithmetic only)
weight_for(key, shape)     the tiny model's weights (exact in fp32, fp16 and bf16)
rle / unrle                run-length coding used for ids, labels and masks
"""

import zlib

import numpy as np

# ----------------------------------------------------------------------------------
# 3. deterministic weights (integers * power of two: exact in fp32, fp16 and bf16)
# ----------------------------------------------------------------------------------
WTE_ALIAS = "model.vision_embed_tokens.wte.weight"  # shares storage with model.embed_tokens.weight


def weight_for(key, shape, seed=0):
    if key == WTE_ALIAS:
        key = "model.embed_tokens.weight"
    rs = np.random.RandomState((zlib.crc32(key.encode()) ^ (seed * 2654435761)) & 0xFFFFFFFF)
    n = int(np.prod(shape))
    k = rs.randint(-127, 128, size=n).astype(np.float32)  # uniform, std ~73.3
    is_norm = "norm" in key or "layrnorm" in key
    if is_norm and key.endswith(".weight"):
        w = 1.0 + np.floor(k / 4) * 2.0**-7  # 1 +- 0.25
    elif key.endswith(".bias"):
        w = k * 2.0**-12  # std ~0.018
    elif key.endswith("glb_GN") or key.endswith("sub_GN") or "embed_tokens.weight" in key:
        w = k * 2.0**-7  # std ~0.57
    elif key == "lm_head.weight":
        w = k * 2.0**-8  # std ~0.29
    elif "embedding" in key:  # CLIP class / patch / position
        w = k * 2.0**-10
    else:  # linear layers: ~1/sqrt(fan_in)
        fan_in = shape[-1]
        e = int(round(np.log2(73.3 * np.sqrt(fan_in))))
        if any(n in key for n in ("qkv_proj", "q_proj", "k_proj")):
            e -= 1  # sharper attention (RoPE errors become visible)
        w = k * 2.0**-e
    return w.reshape(shape).astype(np.float32)


def official_weights(shapes, seed=0):
    return {k: weight_for(k, s, seed) for k, s in shapes.items()}


# ----------------------------------------------------------------------------------
# 4. deterministic images, integer arithmetic only
# ----------------------------------------------------------------------------------
def _upsample(grid, h, w):
    """integer bilinear upsample of a (g,g) grid to (h,w); 8-bit fixed point"""
    g = grid.shape[0]

    def axis(n):
        pos = (np.arange(n, dtype=np.int64) * ((g - 1) * 256)) // max(n - 1, 1)
        i0 = (pos >> 8).astype(np.int64)
        i1 = np.minimum(i0 + 1, g - 1)
        return i0, i1, (pos & 255).astype(np.int32)

    y0, y1, fy = axis(h)
    x0, x1, fx = axis(w)
    g32 = grid.astype(np.int32)
    cols = g32[:, x0] * (256 - fx) + g32[:, x1] * fx  # (g, w)  <= 255*256
    out = (cols[y0] * (256 - fy)[:, None] + cols[y1] * fy[:, None]) >> 16
    return out.astype(np.int32)


def photo(seed, h, w):
    """smooth photo-like image: 4 octaves of value noise per channel"""
    rs = np.random.RandomState(seed)
    out = np.empty((h, w, 3), np.uint8)
    for c in range(3):
        acc = np.zeros((h, w), np.int32)
        for g, wt in ((3, 8), (6, 4), (12, 2), (24, 1)):
            acc += wt * _upsample(rs.randint(0, 256, size=(g, g)), h, w)
        # stretch contrast around 128, integer
        v = ((acc // 15) - 128) * 2 + 128
        out[..., c] = np.clip(v, 0, 255).astype(np.uint8)
    return out


def doc(seed, h, w):
    """document-like image: near-white page, dark text-like strokes in lines, a table"""
    rs = np.random.RandomState(seed)
    page = (236 + _upsample(rs.randint(0, 20, size=(4, 4)), h, w)).astype(np.int32)
    page = np.clip(page, 0, 255).astype(np.uint8)
    lh = max(6, h // 70)  # line height
    y = lh * 3
    mx = max(2, w // 12)
    while y + lh < h - lh * 2:
        if rs.randint(0, 12) == 0:  # paragraph gap
            y += lh * 2
            continue
        x = mx
        end = w - mx - rs.randint(0, max(1, w // 3))
        while x < end:
            n = int(rs.randint(2, 10))  # word of n glyphs
            for _ in range(n):
                gw = max(2, lh // 2)
                ink = int(rs.randint(0, 70))
                kind = int(rs.randint(0, 4))
                top, bot = y + lh // 5, y + lh - lh // 5
                t = max(1, lh // 8)
                if kind in (0, 2):
                    page[top:bot, x : x + t] = ink
                if kind in (1, 2):
                    page[bot - t : bot, x : x + gw - 1] = ink
                if kind == 3:
                    page[top : top + t, x : x + gw - 1] = ink
                    page[top:bot, x + gw // 2 : x + gw // 2 + t] = ink
                x += gw
                if x >= end:
                    break
            x += max(2, lh // 2)
        y += lh + lh // 2
    return np.repeat(page[..., None], 3, axis=2)


GEN = {"photo": photo, "doc": doc}


def make_image(spec):
    """spec: {'gen','seed','h','w','mode'} -> PIL image"""
    from PIL import Image

    h, w, seed = spec["h"], spec["w"], spec["seed"]
    a = GEN[spec.get("gen", "photo")](seed, h, w)
    mode = spec.get("mode", "RGB")
    if mode == "RGB":
        return Image.fromarray(a)
    if mode == "L":
        return Image.fromarray(a[..., 0])
    if mode == "LA":
        return Image.fromarray(np.ascontiguousarray(a[..., :2]), "LA")
    if mode == "RGBA":
        al = photo(seed + 1, h, w)[..., :1]
        return Image.fromarray(np.concatenate([a, al], -1), "RGBA")
    if mode in ("P", "P_transparency"):
        im = Image.fromarray(a[..., 0], "P")
        im.putpalette(
            np.random.RandomState(seed + 2).randint(0, 256, size=768).astype(np.uint8).tobytes()
        )
        if mode == "P_transparency":
            im.info["transparency"] = 7
        return im
    if mode == "1":
        return Image.fromarray(((a[..., 0] > 127) * 255).astype(np.uint8)).convert("1", dither=0)
    if mode == "CMYK":
        al = photo(seed + 1, h, w)[..., :1]
        return Image.fromarray(np.concatenate([a, al], -1), "CMYK")
    if mode == "I;16":
        return Image.fromarray(a[..., 0].astype(np.uint16) * 257)
    if mode == "I":
        return Image.fromarray(a[..., 0].astype(np.int32))
    if mode == "F":
        return Image.fromarray(a[..., 0].astype(np.float32))
    raise KeyError(mode)


def rle(seq):
    out = []
    for v in seq:
        v = int(v)
        if out and out[-1][0] == v:
            out[-1][1] += 1
        else:
            out.append([v, 1])
    return out


def unrle(r):
    return [v for v, n in r for _ in range(n)]
