"""fastsd's package metadata; the tools are configured in pyproject.toml."""

from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
VERSION = next(
    line.split('"')[1]
    for line in (ROOT / "fastsd/__init__.py").read_text().splitlines()
    if line.startswith("__version__")
)

setup(
    name="fastsd",
    version=VERSION,
    description="Stable Diffusion, fast and checked: CLIP, UNet, VAE and samplers of our own, from your own checkpoint",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE", "fastsd/assets/clip-vocabulary/LICENSE"],
    packages=find_packages(include=["fastsd", "fastsd.*"]),
    package_data={"fastsd": ["assets/**/*", "kernels/configs/*", "training/recipes/*", "py.typed"]},
    python_requires=">=3.11",
    install_requires=[
        "torch>=2.10",
        "triton>=3.6,<3.10; platform_system == 'Linux'",
        "numpy>=2.0",
        "safetensors>=0.5",
        "pillow>=11",
        "tokenizers>=0.21",
        "huggingface_hub>=0.30",
        "tqdm>=4.66",
        "typer>=0.12",
        "pyyaml>=6",
    ],
    extras_require={
        "test": [
            "pytest>=8",
            "pytest-benchmark>=5",
            "pytest-xdist>=3.6",
            "hypothesis>=6",
            "diffusers==0.42.1",
            "transformers==5.23.0",
            "peft==0.21.2",
            "scipy>=1.13",
            "torchsde>=0.2.6",
            "resvg-py>=0.5",
        ],
        "train": ["matplotlib>=3.9"],
        "emoji": ["resvg-py>=0.5"],
        "bench": ["matplotlib>=3.9", "scipy>=1.13"],
        "lint": ["ruff==0.17.6", "mypy==2.4.1"],
    },
    entry_points={"console_scripts": ["fastsd = fastsd.cli:main"]},
    classifiers=[
        "License :: OSI Approved :: Apache Software License",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
