"""
Phi-3.5-vision for transformers 5. Importing this package registers its classes with the Auto
classes.
"""

import logging

from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
)

from .model.configuration_phi3_v import Phi3VConfig
from .model.image_processing_phi3_v import Phi3VImageProcessor
from .model.modeling_phi3_v import Phi3VForCausalLM
from .model.processing_phi3_v import Phi3VProcessor

AutoConfig.register(Phi3VConfig.model_type, Phi3VConfig)
AutoModelForCausalLM.register(Phi3VConfig, Phi3VForCausalLM)
AutoModelForImageTextToText.register(Phi3VConfig, Phi3VForCausalLM)
# There is one image processor, and it uses PIL; both of transformers' backends lead to it.
AutoImageProcessor.register(
    Phi3VConfig,
    image_processor_classes={"pil": Phi3VImageProcessor, "torchvision": Phi3VImageProcessor},
)
AutoProcessor.register(Phi3VConfig, Phi3VProcessor)

# Their source files travel with every checkpoint that they save, for use without this package.
Phi3VConfig.register_for_auto_class()
Phi3VForCausalLM.register_for_auto_class("AutoModelForCausalLM")
Phi3VImageProcessor.register_for_auto_class()
Phi3VProcessor.register_for_auto_class()

# On CPUs with AVX512-BF16, bitsandbytes 0.50, which PEFT imports, advises at its import to install
# a kernel for 4 bits on the CPU, whatever is trained ("Failed to load CPU gemm_4bit_forward"). It
# can go when that is said where the kernel would be used.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
