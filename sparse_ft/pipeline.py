"""``import sparse_ft.pipeline`` registers the pipeline with transformers."""

from sparse_ft.integrations.transformers_pipeline import SparseFTPipeline as SparseFTPipeline
