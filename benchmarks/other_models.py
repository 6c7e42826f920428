"""Models of packages that layerwise knows nothing of, for ``python -m benchmarks cuts others``.

    pip install vit-pytorch x-transformers monai segmentation-models-pytorch diffusers pytorchcv

Packages that are missing are named and passed over. Models are as small as their constructors allow.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import pkgutil
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

Samples = Callable[[int], list[Any]]
"""Number of samples -> the samples."""

PACKAGES = (
    "vit_pytorch", "x_transformers", "monai", "segmentation_models_pytorch", "diffusers", "pytorchcv",
)  # fmt: skip


def other_models(largest: int, fit: Callable[[nn.Module, int], list[Tensor]]) -> dict[str, Any]:
    """Return the models of `PACKAGES` that can be made: a function that makes each and its samples.

    Args:
        largest: number of parameters of a pytorchcv network, at most.
        fit: makes the smallest images that a model takes, for so many samples in a batch.
    """
    listed = (_vit_pytorch, _x_transformers, _monai, _segmentation, _diffusers)
    found: dict[str, Any] = {}
    for package, list_models in zip(PACKAGES, (*listed, functools.partial(_pytorchcv, largest))):
        try:
            importlib.import_module(package)
        except ImportError as error:
            print(f"   {package} cannot be imported ({error}); its models are left out")
            continue
        for name, (make, samples) in list_models().items():
            found[f"{package} {name}"] = functools.partial(_made, make, samples, fit)
    return found


def _made(
    make: Callable[[], nn.Module],
    samples: Samples | None,
    fit: Callable[[nn.Module, int], list[Tensor]],
    batch: int,
) -> tuple[nn.Module, list[Any]]:
    from benchmarks.cuts import BATCHES

    model = make()
    return model, fit(model, batch) if samples is None else samples(BATCHES * batch)


def numbers(*shape: int) -> Samples:
    """Return what makes samples of random numbers."""
    return lambda count: list(torch.randn(count, *shape, generator=torch.Generator().manual_seed(0)))


def tokens(length: int) -> Samples:
    """Return what makes samples of token numbers below 100."""
    seed = torch.Generator().manual_seed
    return lambda count: list(torch.randint(1, 100, (count, length), generator=seed(0)))


def named(**shapes: tuple[int, ...]) -> Samples:
    """Return what makes samples that are dictionaries; ``()`` is a time step."""

    def make(count: int) -> list[dict[str, Tensor]]:
        generator = torch.Generator().manual_seed(0)
        columns = {
            name: torch.randn(count, *shape, generator=generator)
            if shape
            else torch.randint(0, 1000, (count,), generator=generator)
            for name, shape in shapes.items()
        }
        return [{name: column[i] for name, column in columns.items()} for i in range(count)]

    return make


# -- one package each -----------------------------------------------------------------------------

_VIT = dict(
    image_size=64, patch_size=16, num_classes=10, dim=64, depth=4, heads=4, mlp_dim=128, dropout=0.1,
    emb_dropout=0.1, seq_len=64, image_patch_size=16, frames=4, frame_patch_size=2, spatial_depth=2,
    temporal_depth=2, cls_depth=2, dim_head=16, num_hierarchies=3, block_repeats=(2, 2, 2), sm_dim=32,
    lg_dim=64, freq_patch_size=8, num_residual_streams=4, ndim=2, input_shape=64, num_slots=4,
)  # fmt: skip
_STAGES: dict[str, Any] = dict(dim=32, depth=(1, 1, 2, 1), heads=(1, 2, 2, 4))
_VIT_OTHERWISE: dict[str, dict[str, Any]] = {
    "ats_vit": dict(max_tokens_per_depth=(16, 12, 10, 8)),
    "cross_vit": dict(image_size=96, sm_patch_size=12, depth=2),
    "crossformer": dict(
        dim=(32, 64, 64, 64), depth=(1, 1, 1, 1), local_window_size=2, global_window_size=(4, 2, 2, 1)
    ),
    "cvt": dict(s1_depth=1, s3_depth=2),
    "jet_vit": dict(window_size=2),
    "levit": dict(stages=2, dim=(32, 64), depth=2, heads=(2, 4), mlp_mult=2),
    "look_vit": dict(depth=2, highres_patch_size=8),
    "max_vit": dict(depth=(1, 1, 1, 1), dim=32, window_size=2),
    "max_vit_with_registers": dict(depth=(1, 1, 1, 1), dim=32, window_size=2),
    "nest": dict(patch_size=4),
    "pit": dict(depth=(2, 2, 2), patch_size=8),
    "regionvit": dict(dim=(32, 64, 64, 64), depth=(1, 1, 1, 1), window_size=2),
    "scalable_vit": dict(**_STAGES, reduction_factor=(4, 2, 1, 1), window_size=(8, 4, None, None)),
    "sep_vit": dict(**_STAGES, window_size=2),
    "simple_vit_1d": dict(patch_size=8),
    "t2t": dict(depth=2),
    "vit_1d": dict(patch_size=8),
}
_VIT_FITTED = {
    "crossformer",
    "cvt",
    "max_vit",
    "max_vit_with_registers",
    "regionvit",
    "scalable_vit",
    "sep_vit",
}
_VIT_WRAPPERS = {  # of other models, of nested tensors, of parallel towers; and what fails by itself
    "accept_video_wrapper", "cct", "cct_3d", "dino", "distill", "efficient", "es_vit", "extractor",
    "learnable_memory_vit", "lejepa", "levjepa", "levjepa_nd", "local_vit", "mae", "mobile_vit", "mp3", "mpp",
    "na_vit", "na_vit_nested_tensor", "na_vit_nested_tensor_3d", "recorder", "simmim", "twins_svt", "vaat",
    "vat", "vat_siglip", "vit_nd_masking",
}  # fmt: skip


def _vit_pytorch() -> dict[str, tuple[Any, Samples | None]]:
    import vit_pytorch

    found: dict[str, tuple[Any, Samples | None]] = {}
    for _, name, _ in pkgutil.iter_modules(vit_pytorch.__path__):
        if name in _VIT_WRAPPERS:
            continue
        options = _VIT | _VIT_OTHERWISE.get(name, {})
        size = options["image_size"]
        samples: Samples | None = numbers(3, size, size)
        if name.endswith("1d"):
            samples = numbers(3, 64)
        elif name.endswith("3d") or name.startswith("vivit"):
            samples = numbers(3, 4, size, size)
        elif name in _VIT_FITTED:
            samples = None
        found[name] = functools.partial(_last_class, f"vit_pytorch.{name}", options), samples
    return found


def _last_class(module: str, options: dict[str, Any]) -> nn.Module:
    """Return an instance of the last class that a Python module defines, with those options that it takes."""
    members = vars(importlib.import_module(module)).values()
    kind = [one for one in members if inspect.isclass(one) and one.__module__ == module][-1]
    taken = inspect.signature(kind.__init__).parameters
    model: nn.Module = kind(**{name: value for name, value in options.items() if name in taken})
    return model


_X_TRANSFORMERS: dict[str, dict[str, Any]] = {
    "plain": {}, "rotary": dict(rotary_pos_emb=True), "alibi": dict(alibi_pos_bias=True),
    "relative": dict(rel_pos_bias=True), "flash": dict(attn_flash=True),
    "gated": dict(ff_glu=True, ff_swish=True), "gated residual": dict(gate_residual=True),
    "sandwich": dict(sandwich_coef=2), "layer drop": dict(layer_dropout=0.3),
    "dropout": dict(attn_dropout=0.1, ff_dropout=0.1), "normed queries": dict(attn_qk_norm=True),
    "macaron": dict(macaron=True), "residual attention": dict(residual_attn=True),
    "shifted": dict(shift_tokens=1), "dynamic positions": dict(dynamic_pos_bias=True),
    "rms norm": dict(use_rmsnorm=True), "deep norm": dict(pre_norm=False, scale_residual=True),
    "hyper-connections": dict(num_residual_streams=4), "one key": dict(attn_one_kv_head=True),
    "value residual": dict(add_value_residual=True), "cope": dict(attn_use_cope=True),
    "reinjected": dict(reinject_input=True), "sparse": dict(attn_sparse_topk=4),
    "integrated": dict(integrate_layers=True), "clamped": dict(softclamp_output=True),
}  # fmt: skip


def _x_transformers() -> dict[str, tuple[Any, Samples | None]]:
    from x_transformers import Decoder, Encoder, TransformerWrapper

    def make(kind: Any, options: dict[str, Any]) -> nn.Module:
        layers = kind(dim=32, depth=4, heads=4, **options)
        model: nn.Module = TransformerWrapper(num_tokens=100, max_seq_len=16, attn_layers=layers)
        return model

    cases = [(name, Decoder, options) for name, options in _X_TRANSFORMERS.items()]
    cases.append(("encoder", Encoder, {}))
    return {name: (functools.partial(make, kind, options), tokens(16)) for name, kind, options in cases}


def _monai() -> dict[str, tuple[Any, Samples | None]]:
    import monai.networks.nets as nets

    plane: dict[str, Any] = dict(spatial_dims=2, in_channels=1, out_channels=2)
    down: dict[str, Any] = dict(channels=(8, 16, 32, 64), strides=(2, 2, 2))
    flat: dict[str, Any] = dict(spatial_dims=2, in_channels=3)
    vit: dict[str, Any] = dict(hidden_size=48, mlp_dim=96, num_heads=4)
    gray, photo = numbers(1, 32, 32), numbers(3, 64, 64)
    levels: dict[str, Any] = dict(blocks_down=(1, 2, 2), dsdepth=2)
    made: dict[str, tuple[Callable[[], nn.Module], Samples | None]] = {
        "UNet": (lambda: nets.UNet(**plane, **down, num_res_units=2, dropout=0.1), gray),
        "UNet without residuals": (lambda: nets.UNet(**plane, **down), gray),
        "BasicUNet": (lambda: nets.BasicUNet(2, 1, features=(8, 8, 16, 32, 64, 8)), gray),
        "BasicUNetPlusPlus": (lambda: nets.BasicUNetPlusPlus(2, 1, features=(8, 8, 16, 32, 64, 8)), gray),
        "AttentionUnet": (lambda: nets.AttentionUnet(**plane, channels=(8, 16, 32), strides=(2, 2)), gray),
        "UNETR": (lambda: nets.UNETR(1, 2, (32, 32), feature_size=8, **vit, spatial_dims=2), gray),
        "SwinUNETR": (lambda: nets.SwinUNETR(1, 2, feature_size=12, spatial_dims=2), numbers(1, 64, 64)),
        "DenseNet": (lambda: nets.DenseNet(2, 1, 4, 16, 8, (2, 2, 2)), numbers(1, 64, 64)),
        "SEResNet50": (lambda: nets.SEResNet50(**flat, num_classes=4), photo),
        "SEResNext50": (lambda: nets.SEResNext50(**flat, num_classes=4), photo),
        "EfficientNetBN": (
            lambda: nets.EfficientNetBN("efficientnet-b0", False, **flat, num_classes=4),
            photo,
        ),
        "VNet": (lambda: nets.VNet(**plane), gray),
        "SegResNet": (lambda: nets.SegResNet(2, 8, 1, 2, dropout_prob=0.1), gray),
        "SegResNetVAE": (lambda: nets.SegResNetVAE((32, 32), spatial_dims=2), gray),
        "SegResNetDS": (lambda: nets.SegResNetDS(2, 8, 1, 2, **levels), gray),
        "SegResNetDS2": (lambda: nets.SegResNetDS2(2, 8, 1, 2, **levels), gray),
        "HighResNet": (lambda: nets.HighResNet(2, 1, 2, dropout_prob=0.1), gray),
        "DynUNet": (
            lambda: nets.DynUNet(
                2, 1, 2, (3, 3, 3), (1, 2, 2), (2, 2), deep_supervision=True, deep_supr_num=1
            ),
            gray,
        ),
        "ViT": (lambda: nets.ViT(1, (32, 32), (8, 8), **vit, classification=True, spatial_dims=2), gray),
        "Regressor": (lambda: nets.Regressor((1, 32, 32), (2,), (8, 16, 32), (2, 2, 2)), gray),
        "Classifier": (lambda: nets.Classifier((1, 32, 32), 4, (8, 16, 32), (2, 2, 2)), gray),
        "AutoEncoder": (lambda: nets.AutoEncoder(2, 1, 1, (8, 16, 32), (2, 2, 2)), gray),
        "VarAutoEncoder": (lambda: nets.VarAutoEncoder(2, (1, 32, 32), 1, 8, (8, 16), (2, 2)), gray),
        "FullyConnectedNet": (lambda: nets.FullyConnectedNet(10, 4, (16, 16), dropout=0.1), numbers(10)),
        "FlexibleUNet": (lambda: nets.FlexibleUNet(3, 2, "efficientnet-b0", spatial_dims=2), photo),
        "MILModel": (lambda: nets.MILModel(2, "att_trans", False, "resnet18"), numbers(3, 3, 64, 64)),
        "ResNet": (lambda: nets.resnet18(spatial_dims=2, n_input_channels=1, num_classes=4), gray),
        "DAF3D": (lambda: nets.DAF3D(in_channels=1, out_channels=2), numbers(1, 32, 32, 32)),
        "Quicknat": (lambda: nets.Quicknat(num_classes=2, num_channels=1, num_filters=8), gray),
        "AHNet": (lambda: nets.AHNet(**flat, out_channels=2, psp_block_num=2), photo),
        "RegUNet": (lambda: nets.RegUNet(2, 1, 8, 2, out_channels=2), gray),
        "DecoderOnlyTransformer": (lambda: nets.DecoderOnlyTransformer(100, 16, 32, 2, 4), tokens(16)),
    }
    return dict(made)


def _segmentation() -> dict[str, tuple[Any, Samples | None]]:
    import segmentation_models_pytorch as package

    names = ("Unet", "UnetPlusPlus", "MAnet", "Linknet", "FPN", "PSPNet", "DeepLabV3", "DeepLabV3Plus")
    found: dict[str, tuple[Any, Samples | None]] = {}
    for name in (*names, "UPerNet", "Segformer"):
        for encoder in ("resnet18", "mobilenet_v2", "efficientnet-b0"):
            make = functools.partial(getattr(package, name), encoder, encoder_weights=None, classes=2)
            found[f"{name} {encoder}"] = make, numbers(3, 64, 64)
        second = functools.partial(make, aux_params=dict(classes=4, dropout=0.3))
        found[f"{name} with a classifier"] = second, numbers(3, 64, 64)
    return found


def _diffusers() -> dict[str, tuple[Any, Samples | None]]:
    import diffusers

    down: dict[str, Any] = dict(block_out_channels=(32, 64), norm_num_groups=8)
    unet: dict[str, Any] = dict(**down, sample_size=32, layers_per_block=1)
    coder: dict[str, Any] = dict(
        **down, down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2
    )
    heads: dict[str, Any] = dict(num_attention_heads=2, attention_head_dim=16, num_layers=3)
    patches: dict[str, Any] = dict(**heads, in_channels=3, sample_size=32, patch_size=4)
    image, text = (3, 32, 32), (7, 32)
    made: dict[str, tuple[Callable[[], nn.Module], Samples | None]] = {
        "UNet2DModel": (
            lambda: diffusers.UNet2DModel(
                **unet,
                down_block_types=("DownBlock2D", "AttnDownBlock2D"),
                up_block_types=("AttnUpBlock2D", "UpBlock2D"),
                dropout=0.1,
            ),
            named(sample=image, timestep=()),
        ),
        "UNet2DConditionModel": (
            lambda: diffusers.UNet2DConditionModel(
                **unet,
                in_channels=3,
                out_channels=3,
                down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
                up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
                cross_attention_dim=32,
                attention_head_dim=8,
            ),
            named(sample=image, timestep=(), encoder_hidden_states=text),
        ),
        "AutoencoderKL": (lambda: diffusers.AutoencoderKL(**coder), named(sample=image)),
        "VQModel": (lambda: diffusers.VQModel(**coder, num_vq_embeddings=16), named(sample=image)),
        "DiTTransformer2DModel": (
            lambda: diffusers.DiTTransformer2DModel(**patches, out_channels=3),
            named(hidden_states=image, timestep=(), class_labels=()),
        ),
        "PixArtTransformer2DModel": (
            lambda: diffusers.PixArtTransformer2DModel(
                **patches, out_channels=6, cross_attention_dim=32, caption_channels=32, norm_num_groups=8
            ),
            named(hidden_states=image, timestep=(), encoder_hidden_states=text),
        ),
        "PriorTransformer": (
            lambda: diffusers.PriorTransformer(**heads, embedding_dim=32, num_embeddings=7),
            named(hidden_states=(32,), timestep=(), proj_embedding=(32,), encoder_hidden_states=text),
        ),
    }
    return dict(made)


def _pytorchcv(largest: int) -> dict[str, tuple[Any, Samples | None]]:
    """Return one classifier of images of each family."""
    from pytorchcv.model_provider import _models, get_model

    families: dict[str, str] = {}
    for name, function in _models.items():
        families.setdefault(function.__module__, name)
    found: dict[str, tuple[Any, Samples | None]] = {}
    for name in families.values():
        try:
            with torch.device("meta"):
                model = get_model(name)
        except (ImportError, NotImplementedError):  # wants a further package, or computes as it is made
            continue
        classifies = hasattr(model, "num_classes") and getattr(model, "in_channels", 3) == 3
        if classifies and sum(parameter.numel() for parameter in model.parameters()) <= largest:
            small = numbers(3, 32, 32) if name.endswith(("cifar10", "cifar100", "svhn")) else None
            found[name] = functools.partial(get_model, name), small
    return found
