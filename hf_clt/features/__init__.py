"""What the features of a CLT are: the text on which they are active, what their weights do, and pages of both."""
