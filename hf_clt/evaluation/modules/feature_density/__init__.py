from .feature_density import FeatureDensity


__all__ = ["FeatureDensity"]
