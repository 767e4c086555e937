"""Packaging: the wheel ships ``inspo_kernels`` alone; training/ and benchmarks/ run from the repository root."""

import re
from pathlib import Path

from setuptools import find_packages, setup

root = Path(__file__).parent
version = re.search(r'__version__ = "(.+)"', (root / "inspo_kernels" / "__init__.py").read_text()).group(1)

training = [
    "accelerate>=1.10",
    "datasets>=4.0",
    "filelock>=3.12",
    "huggingface_hub>=1.0",
    "jinja2>=3.1",
    "matplotlib>=3.9",
    "numpy>=2",
    "peft>=0.19",
    "psutil>=6",
    "pyarrow>=18",
    "pydantic>=2",
    "pyyaml>=6",
    "safetensors>=0.5",
    "tokenizers>=0.22",
    "tqdm>=4.66",
    "transformers>=5.23,<6",
]
# All that benchmarks/ imports, and whom it compares with.
benchmarks = [
    *training,
    "cut-cross-entropy>=25.1; platform_system == 'Linux'",
    "liger-kernel>=0.8.5; platform_system == 'Linux'",
    "pytest-benchmark>=5",
    "scipy>=1.14",
    "triton>=3.6; platform_system == 'Linux'",
    "trl>=1.16,<2",
]
test = [
    *benchmarks,
    "hypothesis>=6.100",
    "mypy>=1.15",
    "pytest>=8",
    "pytest-timeout>=2.3",
    "pytest-xdist>=3.6",
    "ruff>=0.12",
    "tensorboard>=2.18",
]

setup(
    name="inspo-kernels",
    version=version,
    description="Fused log-probs and pairwise preference losses conditioned on the other response (InSPO)",
    long_description=(root / "README.md").read_text() if (root / "README.md").exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    packages=find_packages(include=["inspo_kernels", "inspo_kernels.*"]),
    package_data={"inspo_kernels": ["py.typed"]},
    install_requires=["torch>=2.11,<3"],
    extras_require={
        "models": ["transformers>=5.17,<6"],
        "trl": ["transformers>=5.17,<6", "trl>=1.16,<1.17"],
        "training": training,
        "benchmarks": benchmarks,
        "test": test,
        "docs": ["mkdocs-material>=9.6,<10", "mkdocstrings[python]>=1.0", "ruff>=0.12"],
    },
    classifiers=[
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
)
