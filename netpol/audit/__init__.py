"""Room: attributes dropped packets to pods and policies and logs them."""
