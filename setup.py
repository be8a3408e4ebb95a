"""What the package is, for `pip install .` on a machine that is no robot.

That gives the models, the bags and the `librobot-vlm` command without a ROS installation. On a
robot colcon builds the package by CMakeLists.txt, which installs the messages and the node too.
"""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
PACKAGE = "librobot_vlm_ros"


def version() -> str:
    text = (ROOT / PACKAGE / "__init__.py").read_text(encoding="utf-8")
    return re.search(r'^__version__ = "(.+)"$', text, re.MULTILINE)[1]


def data_below(*folders: str) -> list[str]:
    """Files of `folders` that are no Python, relative to the package."""
    base = ROOT / PACKAGE
    return [
        str(path.relative_to(base))
        for folder in folders
        for path in sorted((base / folder).rglob("*"))
        if path.is_file() and path.suffix not in (".py", ".pyc")
    ]


setup(
    name="librobot-vlm-ros",
    version=version(),
    description="Vision-language models for ROS 2: captions, grounded regions and embeddings",
    license="MIT",
    python_requires=">=3.10",
    packages=find_packages(include=[PACKAGE, f"{PACKAGE}.*"]),
    package_data={
        PACKAGE: [
            "py.typed",
            *data_below("models", "bench", "bags", "demo"),
        ],
    },
    # Where bags/typestore.py looks for the definitions, as in a ROS installation.
    data_files=[
        (f"share/{PACKAGE}/{kind}", [str(path.relative_to(ROOT)) for path in sorted(paths)])
        for kind in ("msg", "srv", "action")
        if (paths := list((ROOT / kind).glob(f"*.{kind}")))
    ],
    # The least that works; requirements.txt holds the pins that we test with.
    install_requires=[
        "jinja2>=3.1",
        "mcap>=1.1",
        "numpy>=1.26",
        "opencv-python-headless>=4.8",
        "pillow>=10",
        "rich>=13",
        "rosbags>=0.10",
        "rosbags-image>=0.10",
        "safetensors>=0.4",
        "scipy>=1.11",
        "tokenizers>=0.21",
        "torch>=2.4",
        "transformers>=5.0",
    ],
    extras_require={
        "adapters": ["peft>=0.17"],
        "quantization": ["bitsandbytes>=0.46"],
        "sentencepiece": ["sentencepiece>=0.2"],
        "evaluation": ["faster-coco-eval>=1.6"],
        "tabletop": ["pybullet>=3.2.5; python_version < '3.12'"],
        "test": ["pytest>=8", "hypothesis>=6.100"],
    },
    entry_points={"console_scripts": [f"librobot-vlm = {PACKAGE}.cli.main:main"]},
)
