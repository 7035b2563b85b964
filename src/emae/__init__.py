"""emae: masked pre-training for the segmentation of serial-section electron microscopy.

The public names below are loaded when they are first used; `import emae` itself loads neither torch nor numpy.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from emae import recipes
    from emae._config import Config, load_config, override
    from emae._datasets import DATASETS, describe, list_datasets, open_labels, open_volume
    from emae._decode import Agglomeration, ClassicalConfig, choose_classical, choose_decoder, decode, segment_raw
    from emae._demo import demo
    from emae._evaluate import Scores, score
    from emae._experiments import Finetune, Pretrain
    from emae._finetune import finetune
    from emae._geometry import Box
    from emae._phantom import PhantomConfig, make_phantom
    from emae._predict import predict
    from emae._pretrain import pretrain
    from emae._runs import Run, load_run
    from emae._segment import segment
    from emae._view import section_views, show
    from emae._volume import Volume, create_volume, resample

__version__ = "0.1.0"

_HOME = {
    "Agglomeration": "_decode",
    "Box": "_geometry",
    "ClassicalConfig": "_decode",
    "Config": "_config",
    "DATASETS": "_datasets",
    "Finetune": "_experiments",
    "PhantomConfig": "_phantom",
    "Pretrain": "_experiments",
    "Run": "_runs",
    "Scores": "_evaluate",
    "Volume": "_volume",
    "choose_classical": "_decode",
    "choose_decoder": "_decode",
    "create_volume": "_volume",
    "decode": "_decode",
    "demo": "_demo",
    "describe": "_datasets",
    "finetune": "_finetune",
    "list_datasets": "_datasets",
    "load_config": "_config",
    "load_run": "_runs",
    "make_phantom": "_phantom",
    "open_labels": "_datasets",
    "open_volume": "_datasets",
    "override": "_config",
    "predict": "_predict",
    "pretrain": "_pretrain",
    "recipes": "recipes",
    "resample": "_volume",
    "score": "_evaluate",
    "section_views": "_view",
    "segment": "_segment",
    "segment_raw": "_decode",
    "show": "_view",
}
__all__ = ["__version__", *_HOME]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'emae' has no attribute {name!r}")
    module = importlib.import_module(f"emae.{_HOME[name]}")
    value = module if name == _HOME[name] else getattr(module, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
