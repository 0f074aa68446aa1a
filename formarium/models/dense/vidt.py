"""ViDT and ViDT+ (Song et al., ICLR 2022 and arXiv 2204.07962): a transformer backbone that carries detection tokens of its own.

RAM, the reconfigured attention module, runs three attentions with one set of weights (section 3.1):

    patch x patch   (shifted) window attention as in Swin, linear in the number of patches; patches never read detection tokens
    det x det       global, among the Q detection tokens
    det x patch     detection tokens read all patches, only in the last stage (eq. 1, bound with det x det)

The body thus hands over four maps of patches and Q object queries at once. The neck has no encoder: six layers of multi-scale deformable
attention refine the queries' boxes, each from the last one's. ViDT+ adds EPFF (a light fusion of the maps), UQR (each query also predicts
256 cosine coefficients of its instance mask), an IoU-aware head and token labels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from formarium.errors import BadInput
from formarium.features import Tap
from formarium.model import Batch, Losses
from formarium.nn.attention import biased_attention, merge_heads, split_heads
from formarium.nn.deformable_decoder import DeformableDecoderLayer, Head
from formarium.nn.drop import DropPath, drop_path_rates
from formarium.nn.image_boxes import generalised_iou, inverse_sigmoid, iou, to_corners
from formarium.nn.init import init_transformer
from formarium.nn.maps import map_to_tokens, tokens_to_map
from formarium.nn.mask_codes import crop_masks, decode_masks, encode_masks
from formarium.nn.matching import detection_cost, hungarian, sigmoid_focal
from formarium.nn.mlp import MLP
from formarium.nn.ops.deformable_attention import DeformableAttention
from formarium.nn.pyramid_fusion import Fusion, Projection
from formarium.nn.shifted_windows import shift_mask, sine_positions
from formarium.nn.token_labels import token_losses
from formarium.nn.windows import from_groups, relative_offsets, to_groups
from formarium.tasks.object_detection.model import Detections, Detector, check_targets, level_padding

Grid = tuple[int, int]


# the body: Swin with reconfigured attention --------------------------------------------------------------------------


class Cross(NamedTuple):
    """What det x patch attention needs: the patches' sine positions [batch, h w, dim], a mask [batch, 1, 1, Q + h w] (-100 on padding)."""

    positions: Tensor
    mask: Tensor


class ReconfiguredAttention(nn.Module):
    """RAM. x: float [batch, Q + h w, dim], detection tokens first; cross: given where they read the patches. Returns the same shape."""

    def __init__(self, dim: int, heads: int, window: int, shift: int, qkv_bias: bool):
        super().__init__()
        self.heads, self.window, self.shift = heads, window, shift
        self.bias_table = nn.Parameter(nn.init.trunc_normal_(torch.empty((2 * window - 1) ** 2, heads), std=0.02))
        self.register_buffer("bias_index", relative_offsets(window)[1], persistent=False)
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.out = nn.Linear(dim, dim)

    def forward(self, det: Tensor, patches: Tensor, grid: Grid, cross: Cross | None) -> Tensor:
        return self.out(torch.cat([self.of_det(det, patches, cross), self.of_patches(patches, grid)], 1))

    def of_det(self, det: Tensor, patches: Tensor, cross: Cross | None) -> Tensor:
        """Detection tokens [batch, Q, dim] over themselves, and where `cross` is given over all patches."""
        q, k, v = split_heads(self.qkv(det), self.heads, 3)
        if cross is None:
            return merge_heads(F.scaled_dot_product_attention(q, k, v))
        _, k2, v2 = split_heads(self.qkv(patches + cross.positions), self.heads, 3)
        mask = cross.mask.to(q.dtype)
        return merge_heads(F.scaled_dot_product_attention(q, torch.cat([k, k2], 2), torch.cat([v, v2], 2), attn_mask=mask))

    def of_patches(self, x: Tensor, grid: Grid) -> Tensor:
        """Patches [batch, h w, dim] over their (shifted) window, with relative position biases; beside the map stand zeros."""
        (height, width), size = grid, self.window
        x = F.pad(x.unflatten(1, grid), (0, 0, 0, -width % size, 0, -height % size))  # b h w c
        full = (x.shape[1], x.shape[2])
        if self.shift:
            x = x.roll((-self.shift, -self.shift), (1, 2))
        q, k, v = split_heads(to_groups(self.qkv(x), size), self.heads, 3)  # (b windows) heads n width
        bias = self.bias_table[self.bias_index].permute(2, 0, 1)[None]  # 1 heads n n
        if self.shift:  # the windows of a sample become heads, so that their masks need no copy a sample
            windows = full[0] * full[1] // size**2
            bias = (bias + shift_mask(full, size, self.shift, x.device)[:, None]).flatten(0, 1)[None]
            q, k, v = (t.unflatten(0, (-1, windows)).flatten(1, 2) for t in (q, k, v))  # b (windows heads) n width
        x = biased_attention(q, k, v, bias.to(q.dtype))
        x = merge_heads(x.reshape(-1, self.heads, *x.shape[2:]))
        x = from_groups(x, size, *full)
        if self.shift:
            x = x.roll((self.shift, self.shift), (1, 2))
        return x[:, :height, :width].flatten(1, 2)


class Block(nn.Module):
    """x + RAM(LN x), then x + MLP(LN x). x: float [batch, Q + h w, dim]; det_positions: [1, Q, hidden], projected to this block's width."""

    def __init__(self, c: ViDT.Config, dim: int, heads: int, shift: int, drop_path: float):
        super().__init__()
        self.queries = c.queries
        self.norm1 = nn.LayerNorm(dim)
        self.attention = ReconfiguredAttention(dim, heads, c.window, shift, c.qkv_bias)
        self.det_position = nn.Linear(c.hidden, dim)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = MLP(dim, int(dim * c.mlp_ratio))
        self.drop = DropPath(drop_path)
        self.tap = Tap(prefix=c.queries)

    def forward(self, x: Tensor, grid: Grid, det_positions: Tensor, cross: Cross | None) -> Tensor:
        normed = self.norm1(x)
        det = normed[:, : self.queries] + self.det_position(det_positions)
        x = x + self.drop(self.attention(det, normed[:, self.queries :], grid, cross))
        x = x + self.drop(self.mlp(self.norm2(x)))
        return self.tap(x, grid=grid)


class Merging(nn.Module):
    """2 x 2 patches become one of twice the width; detection tokens are repeated four times and go through the same layers.

    x: float [batch, Q + h w, dim]. Returns [batch, Q + h/2 w/2, out]. `unused` is in the released weights and touches nothing.
    """

    def __init__(self, dim: int, out: int, queries: int):
        super().__init__()
        self.queries = queries
        self.norm = nn.LayerNorm(4 * dim)
        self.reduction = nn.Linear(4 * dim, out, bias=False)
        self.unused = nn.ModuleDict({"expansion": nn.Linear(dim, out, bias=False), "norm2": nn.LayerNorm(dim)})

    def forward(self, x: Tensor, grid: Grid) -> Tensor:
        det, patches = x[:, : self.queries], x[:, self.queries :].unflatten(1, grid)
        patches = F.pad(patches, (0, 0, 0, grid[1] % 2, 0, grid[0] % 2))
        b, h, w, c = patches.shape
        patches = patches.view(b, h // 2, 2, w // 2, 2, c).permute(0, 1, 3, 4, 2, 5).reshape(b, h * w // 4, 4 * c)  # columns before rows
        return self.reduction(self.norm(torch.cat([det.repeat(1, 1, 4), patches], 1)))


class Body(nn.Module):
    """Swin with RAM. forward: image [batch, 3, height, width] and padding to (maps of stages 2, 3, 4 and one more, detection tokens)."""

    def __init__(self, c: ViDT.Config):
        super().__init__()
        self.config, stages = c, len(c.depths)
        dims = [c.dim * 2**i for i in range(stages)]
        self.embed, self.embed_norm = nn.Conv2d(3, c.dim, 4, 4), nn.LayerNorm(c.dim)
        self.det_tokens = nn.Parameter(nn.init.trunc_normal_(torch.empty(1, c.queries, c.dim), std=0.02))
        self.det_positions = nn.Parameter(nn.init.trunc_normal_(torch.empty(1, c.queries, c.hidden), std=0.02))
        self.tokens = Tap(prefix=c.queries)
        rates = drop_path_rates(c.drop_path, c.depths)
        self.stages = nn.ModuleList()
        for i, dim in enumerate(dims):
            blocks = [Block(c, dim, c.heads[i], (j % 2) * (c.window // 2), rate) for j, rate in enumerate(rates[i])]
            out = 2 * dim if i < stages - 1 else c.hidden
            self.stages.append(nn.ModuleDict({"blocks": nn.ModuleList(blocks), "merge": Merging(dim, out, c.queries)}))
        self.unused_norms = nn.ModuleList([nn.LayerNorm(dim) for dim in dims[1:]])  # in the released weights
        self.channels = [*dims[1:], c.hidden]
        init_transformer(self)

    def forward(self, image: Tensor, padding: Tensor) -> tuple[list[Tensor], Tensor]:
        c = self.config
        image = F.pad(image, (0, -image.shape[3] % 4, 0, -image.shape[2] % 4))
        x = self.embed(image)
        grid = (x.shape[2], x.shape[3])
        x = self.embed_norm(map_to_tokens(x))
        x = self.tokens(torch.cat([self.det_tokens.expand(x.shape[0], -1, -1), x], 1), grid=grid)
        coarse = 2 ** (len(c.depths) - len(c.cross_stages))
        padding = level_padding(padding, (grid[0] // coarse, grid[1] // coarse)) if c.cross_stages else padding
        maps, det = [], x[:, : c.queries]
        for i, stage in enumerate(self.stages):
            cross = None
            if i in c.cross_stages:
                padding = padding if tuple(padding.shape[1:]) == grid else level_padding(padding, grid)
                masked = F.pad(padding.flatten(1).float() * -100.0, (c.queries, 0))[:, None, None]
                cross = Cross(sine_positions(padding, c.dim * 2**i), masked)
            for block in stage["blocks"]:
                x = block(x, grid, self.det_positions, cross)
            det = x[:, : c.queries]
            if i:
                maps.append(tokens_to_map(x[:, c.queries :], grid))
            x = stage["merge"](x, grid)
            grid = ((grid[0] + 1) // 2, (grid[1] + 1) // 2)
        maps.append(tokens_to_map(x[:, c.queries :], grid))
        return maps, det


# the neck ------------------------------------------------------------------------------------------------------------


class Raw(NamedTuple):
    """Predictions of the body (layer 0) and of every decoder layer after it. logits: float [batch, 1 + layers, Q, classes]. boxes: [batch,
    1 + layers, Q, 4], (centre, size) in shares of the picture. ViDT+ only: codes [.., Q, keep], ious (logits) [.., Q, 1], tokens, one
    [batch, h, w, classes] a level."""

    logits: Tensor
    boxes: Tensor
    codes: Tensor | None
    ious: Tensor | None
    tokens: tuple[Tensor, ...] | None


class ViDT(Detector):
    @dataclass(frozen=True)
    class Config:
        dim: int = 48
        depths: tuple[int, ...] = (2, 2, 6, 2)
        heads: tuple[int, ...] = (3, 6, 12, 24)
        window: int = 7
        mlp_ratio: float = 4.0
        qkv_bias: bool = True
        drop_path: float = 0.0
        queries: int = 100  # detection tokens: at most so many objects a picture
        cross_stages: tuple[int, ...] = (3,)  # where detection tokens read the patches
        hidden: int = 256  # width of the neck and of the detection tokens' positions
        groups: int = 32  # of its group norms
        decoder_layers: int = 6
        decoder_heads: int = 8
        decoder_hidden: int = 1024
        points: int = 4
        levels: int = 4
        dropout: float = 0.1
        aux_loss: bool = True  # every layer is trained, not only the last
        refine: bool = True  # every layer moves the last one's boxes
        fusion: bool = False  # EPFF
        fusion_hidden: int = 64  # width inside its residual units
        codes: bool = False  # UQR: instance masks as cosine codes
        code_hidden: int = 256
        keep: int = 256  # coefficients of a code
        mask_size: int = 128
        iou_aware: bool = False
        token_label: bool = False
        num_classes: int = 91  # the largest category number plus one
        class_weight: float = 2.0  # weights of the losses; the first three are the matching's too
        l1_weight: float = 5.0
        giou_weight: float = 2.0
        iou_weight: float = 2.0
        code_weight: float = 3.0
        token_weight: float = 2.0
        distil_weight: float = 4.0

    def __init__(self, config: Config):
        super().__init__(config)
        c = config
        self.body = Body(c)
        if c.fusion:
            self.fusion = Fusion(self.body.channels, c.hidden, c.groups, c.fusion_hidden)
        else:
            self.project = nn.ModuleList([Projection(dim, c.hidden, c.groups) for dim in self.body.channels])
        self.det_project = Projection(self.body.channels[-2], c.hidden, c.groups)
        self.position_project = Projection(c.hidden, c.hidden, c.groups)
        layers = [
            DeformableDecoderLayer(c.hidden, c.decoder_hidden, c.decoder_heads, c.levels, c.points, c.dropout)
            for _ in range(c.decoder_layers)
        ]
        self.decoder = nn.ModuleDict({"layers": nn.ModuleList(layers), "reference": nn.Linear(c.hidden, 2)})
        self.level_embedding = nn.Parameter(torch.randn(c.levels, c.hidden))  # in the released weights; nothing reads it
        for p in self.decoder.parameters():
            if p.ndim > 1:
                nn.init.xavier_uniform_(p)
        for m in self.decoder.modules():
            if isinstance(m, DeformableAttention):
                m.reset()
        prior = -math.log(99)  # a probability of 0.01
        count = c.decoder_layers + 1 if c.refine else 1
        self.features = Tap()
        self.class_heads = nn.ModuleList([nn.Linear(c.hidden, c.num_classes) for _ in range(count)])
        self.box_heads = nn.ModuleList([Head(c.hidden, c.hidden, 4) for _ in range(count)])
        nn.init.constant_(self.box_heads[0].layers[-1].bias[2:], -2.0)
        if c.codes:
            self.code_head = Head(c.hidden, c.code_hidden, c.keep)  # one for all layers
        if c.iou_aware:
            self.iou_heads = nn.ModuleList([Head(c.hidden, c.hidden, 1) for _ in range(count)])
            for head in self.iou_heads:
                head.layers[-1].reset_parameters()
        if c.token_label:
            self.token_project = nn.Sequential(nn.Linear(c.hidden, c.hidden), nn.LayerNorm(c.hidden))
            self.token_head = nn.Linear(c.hidden, c.num_classes)
        for head in [*self.class_heads, *([self.token_head] if c.token_label else [])]:
            nn.init.constant_(head.bias, prior)
        self._teacher: list[ViDT] = []  # in a list, so that its weights are no part of this model

    def forward(self, image: Tensor, padding: Tensor) -> tuple[Tensor, ...]:
        """Normalised image [batch, 3, height, width], zeros where padding (bool [batch, height, width]) is True, to what Raw describes:
        logits and boxes, then of codes, ious and tokens (all levels' in one, [batch, sum of h w, classes]) those that the model has."""
        raw = self.raw(image, padding)
        tokens = torch.cat([t.flatten(1, 2) for t in raw.tokens], 1) if raw.tokens is not None else None
        return tuple(t for t in (raw.logits, raw.boxes, raw.codes, raw.ious, tokens) if t is not None)

    def raw(self, image: Tensor, padding: Tensor) -> Raw:
        return self.heads(*self.encode(image, padding))

    def encode(self, image: Tensor, padding: Tensor) -> tuple[list[Tensor], list[Tensor], Tensor, Tensor]:
        """(the neck's maps [batch, hidden, h, w], their paddings, the queries [batch, Q, hidden], their positions [1, Q, hidden])."""
        maps, det = self.body(image, padding)
        maps = self.fusion(maps) if self.config.fusion else [project(m) for project, m in zip(self.project, maps, strict=True)]
        det = self.det_project(det.transpose(1, 2)[..., None])[..., 0].transpose(1, 2)
        positions = self.position_project(self.body.det_positions.transpose(1, 2)[..., None])[..., 0].transpose(1, 2)
        return maps, [level_padding(padding, (m.shape[2], m.shape[3])) for m in maps], det, positions

    def heads(self, maps: list[Tensor], paddings: list[Tensor], x: Tensor, positions: Tensor) -> Raw:
        c = self.config
        states, boxes = self.decode(maps, paddings, x, positions)
        logits = [self._of(self.class_heads, i)(s) for i, s in enumerate(states)]
        codes = torch.stack([self.code_head(s) for s in states], 1) if c.codes else None
        ious = torch.stack([self._of(self.iou_heads, i)(s) for i, s in enumerate(states)], 1) if c.iou_aware else None
        tokens = tuple(self._label(m, p) for m, p in zip(maps, paddings, strict=True)) if c.token_label else None
        return Raw(torch.stack(logits, 1), torch.stack(boxes, 1), codes, ious, tokens)

    def decode(self, maps: list[Tensor], paddings: list[Tensor], x: Tensor, positions: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """The queries' states and boxes: the body's, then each decoder layer's."""
        shapes = [(m.shape[2], m.shape[3]) for m in maps]
        memory = torch.cat([map_to_tokens(m) for m in maps], 1)
        hidden = torch.cat([p.flatten(1) for p in paddings], 1)
        ratios = torch.stack([torch.stack([(~p[:, 0]).float().mean(1), (~p[:, :, 0]).float().mean(1)], -1) for p in paddings], 1)  # b l 2
        positions = positions.expand(x.shape[0], -1, -1)
        reference = self.decoder["reference"](positions).sigmoid()
        states, boxes = [], []
        for i in range(len(self.decoder["layers"]) + 1):
            if i:
                scale = ratios if reference.shape[-1] == 2 else ratios.repeat(1, 1, 2)
                x = self.decoder["layers"][i - 1](x, positions, reference[:, :, None] * scale[:, None], memory, shapes, hidden)
            state = self.features(x) if i == len(self.decoder["layers"]) else x
            moved = self._of(self.box_heads, i)(state) + F.pad(inverse_sigmoid(reference), (0, 4 - reference.shape[-1]))
            states.append(state)
            boxes.append(moved.sigmoid())
            if self.config.refine:
                reference = boxes[-1].detach()
        return states, boxes

    def _of(self, heads: nn.ModuleList, layer: int) -> nn.Module:
        return heads[min(layer, len(heads) - 1)]

    def _label(self, x: Tensor, padding: Tensor) -> Tensor:
        """Class logits of every patch [batch, h, w, classes]; patches in the padding or within a hundredth of the border count as zero."""
        b, _, h, w = x.shape
        height, width = (~padding[:, :, 0]).sum(1).view(b, 1, 1), (~padding[:, 0]).sum(1).view(b, 1, 1)
        y = ((torch.arange(h, device=x.device) + 0.5)[:, None] / height).expand(b, h, w)
        place = (torch.arange(w, device=x.device) + 0.5) / width
        inside = (y > 0.01) & (y < 0.99) & (place > 0.01) & (place < 0.99) & ~padding
        return self.token_head(self.token_project(x.permute(0, 2, 3, 1) * inside[..., None]))

    # learning -----------------------------------------------------------------------------------------------------------

    def loss(self, batch: Batch) -> Losses:
        """Set losses on every layer's prediction, matched anew (terms: the last layer's; `auxiliary`: the others' weighted sum), token
        labels, and where there is a teacher the distance to its tokens."""
        c = self.config
        check_targets(batch, c.num_classes)
        if (c.codes or c.token_label) and "masks" not in batch:
            fix = "create the model with codes=False, token_label=False"
            raise BadInput("batch", expected="instance masks", got="boxes only", fix=fix)
        found = self.encode(self.prepared(batch), batch["padding"])
        raw = self.heads(*found)
        labels = batch["labels"]
        total = (labels >= 0).sum().clamp_min(1).float()
        each = self._set_losses(raw, batch, total)
        weights = {"class": c.class_weight, "l1": c.l1_weight, "giou": c.giou_weight, "iou_aware": c.iou_weight, "codes": c.code_weight}
        terms = {k: weights[k] * v[-1] for k, v in each.items()}
        if c.aux_loss and raw.logits.shape[1] > 1:
            terms["auxiliary"] = torch.stack([weights[k] * v[:-1].sum() for k, v in each.items()]).sum()
        if raw.tokens is not None:
            terms |= {k: c.token_weight * v for k, v in token_losses(raw.tokens, batch["masks"], labels, total).items()}
        for teacher in self._teacher:
            terms["distil"] = c.distil_weight * self._distance(found, teacher, batch)
        return Losses(torch.stack([*terms.values()]).sum(), terms)

    def _set_losses(self, raw: Raw, batch: Batch, total: Tensor) -> dict[str, Tensor]:
        """Each loss [1 + layers], divided by the number of objects."""
        c, (b, count, _, _) = self.config, raw.logits.shape
        logits, boxes = raw.logits.flatten(0, 1).float(), raw.boxes.flatten(0, 1).float()  # (b layers) q .
        labels, targets = (batch[k].repeat_interleave(count, 0) for k in ("labels", "boxes"))
        cost = detection_cost(logits, boxes, labels, targets, (c.class_weight, c.l1_weight, c.giou_weight))
        which, query, thing = hungarian(cost, (labels >= 0).sum(1).tolist())
        layer = which % count

        def a_layer(values: Tensor) -> Tensor:
            return values.new_zeros(count).index_add(0, layer, values)

        wanted = torch.zeros_like(logits)
        wanted[which, query, labels[which, thing]] = 1
        said, true = boxes[which, query], targets[which, thing]
        losses = {
            "class": sigmoid_focal(logits, wanted).sum((1, 2)).view(b, count).sum(0) / total,
            "l1": a_layer((said - true).abs().sum(-1)) / total,
            "giou": a_layer(1 - generalised_iou(to_corners(said), to_corners(true))) / total,
        }
        if raw.ious is not None:
            overlap = iou(to_corners(said), to_corners(true))[0].detach()
            guess = raw.ious.flatten(0, 1)[which, query, 0].float()
            losses["iou_aware"] = a_layer(F.binary_cross_entropy_with_logits(guess, overlap, reduction="none")) / total
        if raw.codes is not None:
            there = batch["labels"] >= 0
            owner = there.nonzero()[:, 0]
            corners = to_corners(batch["boxes"][there]) * batch["size"][owner].flip(1).repeat(1, 2)
            code = encode_masks(crop_masks(batch["masks"][there], corners, c.mask_size), c.keep)
            row = there.flatten().cumsum(0).view_as(there) - 1
            off = (raw.codes.flatten(0, 1)[which, query].float() - code[row[which // count, thing]]).abs().mean(-1)
            losses["codes"] = a_layer(off) / max(1, len(code))
        return losses

    def _distance(self, found: tuple[list[Tensor], list[Tensor], Tensor, Tensor], teacher: ViDT, batch: Batch) -> Tensor:
        """Token matching (section 3.3): root of the summed mean distances between the maps, the body's and all layers' detection tokens."""
        with torch.no_grad():
            theirs = teacher.eval().encode(teacher.prepared(batch), batch["padding"])
            their_states = teacher.decode(*theirs)[0]
        states = self.decode(*found)[0]

        def apart(a: Tensor, b: Tensor) -> Tensor:
            return (a - b).square().sum(-1).clamp_min(1e-12).sqrt().mean()

        maps = [apart(map_to_tokens(a), map_to_tokens(b)) for a, b in zip(found[0], theirs[0], strict=True)]
        neck = [apart(a, b) for a, b in zip(states, their_states, strict=True)]
        return torch.stack([*maps, apart(found[2], theirs[2]), *neck]).sum().sqrt()

    def distil_from(self, teacher: ViDT) -> ViDT:
        """Learn from a larger, trained model with the same detection tokens, neck and levels. Returns self."""
        for key in ("queries", "hidden", "decoder_layers", "fusion"):
            ours, theirs = getattr(self.config, key), getattr(teacher.config, key)
            if ours != theirs:
                raise BadInput("teacher", expected=f"{key} = {ours}, as the student has", got=str(theirs))
        self._teacher = [teacher.requires_grad_(False).to(self.device)]
        return self

    def no_weight_decay(self) -> set[str]:
        return {"body.det_tokens", "body.det_positions"}

    # predicting ---------------------------------------------------------------------------------------------------------

    def predict(self, batch: Batch, most: int = 100) -> Detections:
        """The likeliest of all queries and classes, at most 100, best first."""
        raw = self.raw(self.prepared(batch), batch["padding"])
        scores = raw.logits[:, -1].float().sigmoid()
        best, index = scores.flatten(1).topk(min(most, scores.shape[1] * scores.shape[2]))
        query, label = index // scores.shape[2], index % scores.shape[2]
        extent = batch["original_size"].flip(1).repeat(1, 2)[:, None]
        boxes = to_corners(raw.boxes[:, -1].float()).gather(1, query[..., None].expand(-1, -1, 4)) * extent
        if raw.codes is None:
            return Detections(best, label, boxes)
        codes = raw.codes[:, -1].gather(1, query[..., None].expand(-1, -1, raw.codes.shape[-1]))
        return Detections(best, label, boxes, decode_masks(codes, self.config.mask_size))

    def keep_layers(self, count: int) -> ViDT:
        """Drop the decoder layers behind the first `count` of a trained model, which then is faster (section 4.3). Returns self."""
        if not 0 <= count <= self.config.decoder_layers:
            raise BadInput("layers", expected=f"0 to {self.config.decoder_layers}", got=str(count))
        self.decoder["layers"] = self.decoder["layers"][:count]
        for name in ("class_heads", "box_heads", "iou_heads"):
            if hasattr(self, name):
                setattr(self, name, getattr(self, name)[: count + 1])
        self.config = replace(self.config, decoder_layers=count)
        return self

    def check_size(self, height: int, width: int) -> None:
        least = 4 * 2 ** (len(self.config.depths) - len(self.config.cross_stages))
        if height < least or width < least:
            raise BadInput("image size", expected=f"at least {least}x{least}", got=f"{height}x{width}", fix="enlarge the image")
