"""From camera frame or taxels to the marker image."""
