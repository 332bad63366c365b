"""s3prl's upstream and featurizer: reaching the runner's, pooling what they give, keeping the result."""
