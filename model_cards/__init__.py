"""The templates of the generated model cards; installed as the package `hf_clt.model_cards`."""
