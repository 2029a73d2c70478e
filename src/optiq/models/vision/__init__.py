"""Images: side towers kept beside a model, pictures read with care, and what makes features."""
