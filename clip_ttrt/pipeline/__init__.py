"""From files to features: decode, preprocess, embed."""
