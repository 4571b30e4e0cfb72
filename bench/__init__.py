"""The measurements. (This file lets `import bench` find the folder, and not bench.py in it, when a script in here is run.)"""
