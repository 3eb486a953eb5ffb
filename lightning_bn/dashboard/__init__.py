"""The page that shows a journal: a tab in TensorBoard, and one HTML file."""
