"""The measurements. This file lets `import bench` find the folder when a script in it is run."""
