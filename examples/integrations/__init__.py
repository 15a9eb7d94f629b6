"""Training with the trainers and libraries people use, each twice: with native losses, and with fusedloss's.

    python -m examples.integrations                      # all whose packages are installed
    python -m examples.integrations lightning_trainer    # one of them

Models are tiny and data are random: what is shown is what to change, and that the losses stay the same. The packages
are those of requirements/integrations.txt.
"""

NEEDS: dict[str, tuple[str, ...]] = {  # beside torch
    "huggingface_trainer": ("transformers", "accelerate"),
    "trl_sft": ("trl", "transformers", "datasets"),
    "lightning_trainer": ("lightning",),
    "accelerate_loop": ("accelerate",),
    "distributed": (),
    "compiled_step": (),
    "image_classification": ("timm", "torchvision"),
    "segmentation": ("torchvision",),
    "detection": (),
    "metrics": ("torchmetrics",),
}
